"""A vocabulary: the words a detector looks for, in order, with the phrases that stand for them in prompts.

This file does not embed anything: see `embeddings.py`.
"""

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.parsing import parse_json


def normalize_word(word: str) -> str:
    """Lower-case, underscores to spaces, single spaces: "Fire_Engine " -> "fire engine". Qualifiers stay."""
    return " ".join(word.replace("_", " ").split()).casefold()


def prompt_phrase(word: str) -> str:
    """The phrase for a prompt: underscores to spaces, a parenthesised qualifier removed unless nothing else is left.

    "mouse_(computer_equipment)" -> "mouse". Upper case is kept, tokenizers decide about it.
    """
    text = " ".join(word.replace("_", " ").split())
    without = " ".join(re.sub(r"\([^()]*\)", " ", text).split())
    return without or " ".join(re.sub(r"[()]", " ", text).split()) or text


@dataclass(frozen=True)
class Vocabulary:
    """Words in the order of the classes; class i of a detection is `words[i]`.

    Attributes:
        words: names to show, one for each class.
        synonyms: for each class the phrases for prompts; the first stands for the name itself.
    """

    words: tuple[str, ...]
    synonyms: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def from_words(cls, words: Iterable[str], source: str = "the list of words") -> "Vocabulary":
        """From words in any language; blanks are dropped, duplicates merged with a warning that names them.

        Raises:
            ValueError: no word is left.
        """
        if not isinstance(words, Iterable):
            raise ValueError(f"words are {words!r}; give a list of words, or one text with commas")
        kept: dict[str, str] = {}
        duplicates = []
        for word in words:
            if not isinstance(word, str):
                raise ValueError(f"{source} holds {word!r}, but a word is text; write it in quotes")
            if any("\ud800" <= letter <= "\udfff" for letter in word):
                raise ValueError(f"{source} holds {word!r}, which has half a letter in it; write it as UTF-8")
            key = normalize_word(word)
            if not key:
                continue
            if key in kept:
                duplicates.append(word.strip())
            kept.setdefault(key, word.strip())
        if duplicates:
            warnings.warn(f"{source} repeats {', '.join(duplicates)}; each is kept once", stacklevel=2)
        if not kept:
            raise ValueError(f"{source} holds no words, but a vocabulary needs at least one; add one")
        return cls(tuple(kept.values()), _phrases([[word] for word in kept.values()]))

    @classmethod
    def from_text_file(cls, path: str | Path) -> "Vocabulary":
        """From a UTF-8 text file with one word a line; blank lines and lines that start with # are skipped."""
        lines = _read(Path(path)).splitlines()
        return cls.from_words((line for line in lines if not line.lstrip().startswith("#")), source=str(path))

    @classmethod
    def from_categories(cls, categories: Sequence[dict], source: str = "the categories") -> "Vocabulary":
        """From LVIS or COCO categories, sorted by id, so that class i is the i-th category. Nothing is merged: two
        categories with the same words stay two classes. "synonyms" are kept as further phrases.

        Raises:
            ValueError: there is none, or one without a whole number as id, without a name, or with odd synonyms.
        """
        for category in categories:
            if not isinstance(category, dict) or type(category.get("id")) is not int:
                raise ValueError(f"{source} has {category!r:.80} for a category; each needs an id, a whole number")
            texts = category.get("synonyms", [])
            if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{source}: the synonyms of category {category['id']} must be a list of texts")
        ordered = sorted(categories, key=lambda category: category["id"])
        if not ordered:
            raise ValueError(f"{source} holds no categories, but a vocabulary needs at least one; add one")
        nameless = [c["id"] for c in ordered if not isinstance(c.get("name"), str) or not c["name"].strip()]
        if nameless:
            raise ValueError(f"{source} has categories without a name (ids {nameless[:5]}); give each a name")
        names = tuple(c["name"] for c in ordered)
        return cls(names, _phrases([[c["name"], *c.get("synonyms", ())] for c in ordered]))

    @classmethod
    def from_json(cls, path: str | Path) -> "Vocabulary":
        """From an LVIS or COCO annotation file ("categories"), a list of categories, or a list of words."""
        text = _read(Path(path))
        try:
            content = parse_json(text)
        except ValueError as error:
            raise ValueError(f"vocabulary file {path} is not valid JSON ({error}); check the file") from error
        if isinstance(content, dict):
            content = content.get("categories")
        if not isinstance(content, list):
            raise ValueError(f'vocabulary file {path} has no list of words or categories; add a "categories" list')
        if all(isinstance(entry, str) for entry in content):
            return cls.from_words(content, source=str(path))
        return cls.from_categories(content, source=str(path))

    @classmethod
    def parse(cls, words: "Vocabulary | str | Path | Iterable[str]") -> "Vocabulary":
        """From anything a user may write: "cat, dog", a path to a .txt or .json file, or a list of words.

        A string is a path when it ends in .txt or .json or names a file, and a comma list otherwise.
        """
        if isinstance(words, Vocabulary):
            return words
        if isinstance(words, str) and (words.lower().endswith((".txt", ".json")) or _is_file(words)):
            words = Path(words)
        if isinstance(words, Path):
            return cls.from_json(words) if words.suffix.lower() == ".json" else cls.from_text_file(words)
        if isinstance(words, str):
            return cls.from_words(words.split(","), source="the comma list")
        return cls.from_words(words)


def _is_file(text: str | Path) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # a long comma list is no possible file name
        return False


def _read(path: Path) -> str:
    if not _is_file(path):
        raise ValueError(
            f"vocabulary file {path} does not exist; check the path, or give the words separated by commas"
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"vocabulary file {path} is not UTF-8 text; save it as UTF-8") from error


def _phrases(names: list[list[str]]) -> tuple[tuple[str, ...], ...]:
    """Prompt phrases of each class; a qualifier comes back as words where classes would read the same without it."""
    counts: dict[str, int] = {}
    for first, *_ in names:
        counts[prompt_phrase(first).casefold()] = counts.get(prompt_phrase(first).casefold(), 0) + 1
    result = []
    for first, *others in names:
        phrase = prompt_phrase(first)
        if counts[phrase.casefold()] > 1:
            phrase = " ".join(re.sub(r"[()_]", " ", first).split()) or phrase
        phrases = {phrase.casefold(): phrase}
        for other in others:
            phrases.setdefault(prompt_phrase(other).casefold(), prompt_phrase(other))
        result.append(tuple(p for p in phrases.values() if p))
    return tuple(result)
