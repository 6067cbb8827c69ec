"""Weak and strong caption views as clip-rocket draws them (arXiv 2305.08675): stop words dropped; in the strong view
also exactly one operation of EDA ("Easy Data Augmentation", arXiv 1901.11196): a synonym, a swap or deletions.

The stop words, the weights of the operations and how much each does are those of the authors' code, which calls EDA by
the package textaugment. Different from it: a caption is split at white space, where NLTK's tokeniser parts punctuation
too (so a stop word's punctuation goes with it, and what sticks to a word moves with it); a swap always takes two
different words, where textaugment, in one of L³ captions of L words, finds none and leaves the caption.

A caption is never left empty. Templates and keywords are `text_augment`'s.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from open_clip.tokenizer import basic_clean, whitespace_clean

from pretrain.config import CaptionConfig, ConfigError
from pretrain.data.text_augment import training_caption

# NLTK's English list, 179 words: PostgreSQL's of 127, and what contractions are made of.
STOP_WORDS = frozenset(
    """
    i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it
    its itself they them their theirs themselves what which who whom this that these those am is are was were be been
    being have has had having do does did doing a an the and but if or because as until while of at by for with about
    against between into through during before after above below to from up down in out on off over under again further
    then once here there when where why how all any both each few more most other some such no nor not only own same so
    than too very s t can will just don should now

    ain aren couldn d didn doesn hadn hasn haven isn ll m ma mightn mustn needn o re shan shouldn ve wasn weren won
    wouldn y aren't couldn't didn't doesn't don't hadn't hasn't haven't isn't it's mightn't mustn't needn't shan't she's
    should've shouldn't that'll wasn't weren't won't wouldn't you'd you'll you're you've
    """.split()
)

# The three operations and how often each is drawn.
OPERATIONS = ("synonym", "swap", "deletion")
OPERATION_WEIGHTS = (0.4, 0.4, 0.2)

_EDGES = ".,;:!?\"'()[]"


@dataclass
class TextViewOptions:
    """How both caption views are made; the defaults are the published ones."""

    stop_word_probability: float = 0.8  # chance that a caption loses its stop words (all of them: one draw)
    eda_words: int = 1  # words replaced by synonyms, or swaps made
    deletion_probability: float = 0.1  # each word's, where deletion is drawn
    repair: bool = False  # first repair encoding and HTML entities, and make lower case
    captions: str = "multi"  # multi: each view draws one of the row's captions; single: all views have the same one
    # A file of lines word<TAB>synonym|synonym (`tools/prepare_data.py synonyms` makes WordNet's); None: none are known.
    synonyms: str | None = None
    keywords_as_synonyms: bool = False  # the row's keywords stand in where no word has a synonym (see `TextView`)


def check_text_options(options: TextViewOptions, where: str) -> None:
    """Raise ConfigError for a value that cannot work; `where` is the group's name."""
    for name in ("stop_word_probability", "deletion_probability"):
        if not 0 <= (value := getattr(options, name)) <= 1:
            raise ConfigError(f"{where}.{name} is {value}: it must be in 0 to 1")
    if options.eda_words < 1:
        raise ConfigError(f"{where}.eda_words is {options.eda_words}: it must be at least 1")
    if options.captions not in ("multi", "single"):
        raise ConfigError(f"{where}.captions is {options.captions!r}: use multi or single")


def read_synonyms(path: str | Path) -> dict[str, list[str]]:
    """Synonyms by lower-case word, from lines `word<TAB>synonym|synonym`; empty lines and those with # are skipped.

    Raises:
        ConfigError: if there is no such file, or a line is of another form (the message has its number).
    """
    path, found = Path(path), {}
    if not path.is_file():
        raise ConfigError(
            f"no synonym file at {path}, which text.synonyms names: run `python tools/prepare_data.py synonyms`, or "
            "set text.synonyms=null for none"
        )
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        word, tab, others = line.partition("\t")
        synonyms = [other.strip() for other in others.split("|") if other.strip()]
        if not tab or not word.strip() or not synonyms:
            raise ConfigError(f"{path}, line {number}: {line[:60]!r} is not of the form word<TAB>synonym|synonym")
        found[word.strip().lower()] = synonyms
    return found


def drop_stop_words(words: list[str]) -> list[str]:
    """The words without stop words (punctuation around them and case do not count); all if nothing else is left."""
    return [w for w in words if w.strip(_EDGES).lower() not in STOP_WORDS] or words


def replace_synonyms(
    words: list[str], synonyms: Mapping[str, list[str]], count: int, rng: np.random.Generator
) -> list[str] | None:
    """Up to `count` different words that have synonyms, each replaced by one of them wherever it occurs; punctuation
    around it stays. None if no word has any; stop words have none."""
    cores = [word.strip(_EDGES) for word in words]
    # A dictionary instead of a set: its order does not depend on the process.
    known = [core for core in dict.fromkeys(cores) if core.lower() in synonyms and core.lower() not in STOP_WORDS]
    if not known:
        return None
    replaced = list(words)
    for number in rng.permutation(len(known))[:count]:
        choices = synonyms[known[number].lower()]
        choice = choices[rng.integers(len(choices))]
        for place, core in enumerate(cores):
            if core == known[number]:
                before, after = words[place].split(core, 1)
                replaced[place] = before + choice + after
    return replaced


def swap_words(words: list[str], count: int, rng: np.random.Generator) -> list[str]:
    """`count` times, two words at different places change places."""
    swapped = list(words)
    if len(words) > 1:
        for _ in range(count):
            i, j = rng.choice(len(words), 2, replace=False)
            swapped[i], swapped[j] = swapped[j], swapped[i]
    return swapped


def delete_words(words: list[str], probability: float, rng: np.random.Generator) -> list[str]:
    """Each word left out with the probability; one drawn word if none would stay."""
    kept = [word for word in words if rng.random() >= probability]
    return kept or [words[rng.integers(len(words))]]


class TextView:
    """Make one caption view of a row.

    Where a synonym was drawn but no word has any: with `keywords_as_synonyms`, a keyword of the row that the caption
    does not have takes the place of one of its words (keywords tell of the picture, though seldom of that word).
    Otherwise the words stay as they are, as published; but without a list of synonyms, where that would be every time,
    one of the other operations is drawn, with their own weights.

    Args:
        options: the strength.
        strong: whether an EDA operation follows.
        caption: how the caption is drawn and put into a template before.

    Raises:
        ConfigError: for a synonym file that cannot be used.
    """

    def __init__(self, options: TextViewOptions, strong: bool, caption: CaptionConfig):
        self.options, self.strong, self.caption = options, strong, caption
        self._synonyms = read_synonyms(options.synonyms) if strong and options.synonyms else {}

    def __call__(self, row: dict, rng: np.random.Generator) -> str:
        """A caption; words are joined by single spaces."""
        captions = row.get("captions") or []
        if self.options.captions == "single" and len(captions) > 1:
            row = {**row, "captions": [captions[_shared_draw(rng, len(captions))]]}
        text = training_caption(row, config=self.caption, rng=rng)
        if self.options.repair:
            text = whitespace_clean(basic_clean(text)).lower()
        words = text.split()
        if not words:
            return text
        if rng.random() < self.options.stop_word_probability:
            words = drop_stop_words(words)
        if self.strong:
            words = self._operate(words, row, rng)
        return " ".join(words)

    def _operate(self, words: list[str], row: dict, rng: np.random.Generator) -> list[str]:
        options = self.options
        operation = OPERATIONS[rng.choice(3, p=OPERATION_WEIGHTS)]
        if operation == "synonym":
            replaced = replace_synonyms(words, self._synonyms, options.eda_words, rng)
            replaced = replaced or self._keyword(words, row, rng)
            if replaced or self._synonyms:
                return replaced or words
            swap, deletion = OPERATION_WEIGHTS[1:]
            operation = "swap" if rng.random() < swap / (swap + deletion) else "deletion"
        if operation == "swap":
            return swap_words(words, options.eda_words, rng)
        return delete_words(words, options.deletion_probability, rng)

    def _keyword(self, words: list[str], row: dict, rng: np.random.Generator) -> list[str] | None:
        if not self.options.keywords_as_synonyms:
            return None
        present = {word.strip(_EDGES).lower() for word in words}
        keywords = [k for k in (row.get("keywords") or "").split("|") if k and k.lower() not in present]
        # A stop word names nothing that a keyword could stand for.
        places = [i for i, word in enumerate(words) if word.strip(_EDGES).lower() not in STOP_WORDS]
        if not keywords or not places:
            return None
        replaced = list(words)
        replaced[places[rng.integers(len(places))]] = keywords[rng.integers(len(keywords))]
        return replaced


def _shared_draw(rng: np.random.Generator, count: int) -> int:
    """A draw that all views of a sample share: from the key that its generator was made of, not from its state."""
    sequence = rng.bit_generator.seed_seq
    return int(np.random.default_rng(np.random.SeedSequence(sequence.entropy, spawn_key=(1,))).integers(count))
