"""Check that a training file and a training vocabulary hold nothing of the novel classes.

The protocol of ViLD (Gu et al., 2022, section 4): novel classes are unknown to detector training, their names included.
Only annotation files and words are examined here; pictures are not searched for unlabelled novel objects.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ovd.data.lvis import normalise_name


@dataclass(frozen=True)
class Finding:
    """One trace of a novel class: its kind (where it was looked for) and a sentence."""

    kind: str
    detail: str


@dataclass
class LeakReport:
    """What was found and how much was looked at; `shared_synonyms` are words base and novel classes have in common."""

    findings: list[Finding] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    shared_synonyms: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True when nothing leaks."""
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON types."""
        return {"ok": self.ok, **asdict(self)}

    def raise_if_leaking(self) -> None:
        """Raise ValueError with the first findings when something leaks."""
        if self.findings:
            shown = "; ".join(f.detail for f in self.findings[:5])
            rest = f"; and {len(self.findings) - 5} more" if len(self.findings) > 5 else ""
            raise ValueError(
                f"novel classes leak into training: {shown}{rest}. ovd.data.lvis.filter_to_base removes their entries"
            )


def _check_ids(ground_truth: dict, novel_ids: dict[int, str], report: LeakReport) -> None:
    """Look for novel ids in the annotations, the categories and both federated lists."""
    for category in ground_truth["categories"]:
        if category["id"] in novel_ids:
            report.findings.append(
                Finding("categories", f"category {category['id']} ({novel_ids[category['id']]}) is listed for training")
            )
    for a in ground_truth["annotations"]:
        if a["category_id"] in novel_ids:
            name = novel_ids[a["category_id"]]
            report.findings.append(Finding("annotations", f"annotation {a.get('id')} is a {name} (novel)"))
    for key in ("neg_category_ids", "not_exhaustive_category_ids"):
        report.counts[key] = sum(len(image.get(key, [])) for image in ground_truth["images"])
        for image in ground_truth["images"]:
            for i in image.get(key, []):
                if i in novel_ids:
                    report.findings.append(Finding(key, f"{key} of image {image['id']} names {novel_ids[i]} (novel)"))


class _NovelWords:
    """The novel classes' words, and which of them base names also claim."""

    def __init__(self, novel: list[dict], train_categories: list[dict]) -> None:
        self.exact = {normalise_name(c["name"], keep_qualifier=True) for c in novel}
        self.names = {normalise_name(c["name"]) for c in novel}
        self.all = self.names | {normalise_name(s) for c in novel for s in c.get("synonyms", [])}
        ids = {c["id"] for c in novel}
        base = [c["name"] for c in train_categories if c["id"] not in ids]
        self.base = {normalise_name(n) for n in base if normalise_name(n, keep_qualifier=True) not in self.exact}

    def judge(self, word: str) -> str:
        """Return "leak", "shared" or "free" for a word of the training side; a base name wins over a novel synonym."""
        plain = normalise_name(word)
        if normalise_name(word, keep_qualifier=True) in self.exact and plain not in self.base:
            return "leak"
        if plain not in self.all:
            return "free"
        return "shared" if plain in self.base else "leak"


def check_leaks(
    train_ground_truth: dict[str, Any],
    novel: list[dict],
    vocabulary_words: list[str],
    image_folder: str | Path | None = None,
) -> LeakReport:
    """Look for novel classes wherever detector training could learn of them.

    Args:
        train_ground_truth: parsed LVIS file used for training.
        novel: the novel categories (LVIS dicts with `id`, `name`, `synonyms`).
        vocabulary_words: words the classifier is trained with.
        image_folder: when given, the training pictures are also counted as present or missing.

    Returns:
        The report. A novel synonym that is also a base class's name is listed as shared, not as a leak.
    """
    report = LeakReport()
    _check_ids(train_ground_truth, {c["id"]: c["name"] for c in novel}, report)
    words = _NovelWords(novel, train_ground_truth["categories"])
    novel_ids, shared = {c["id"] for c in novel}, set()
    named = [("category names", c["name"]) for c in train_ground_truth["categories"] if c["id"] not in novel_ids]
    for kind, word in named + [("vocabulary", w) for w in vocabulary_words]:
        verdict = words.judge(word)
        if verdict == "leak":
            detail = f"{word!r} among the training {kind} is a novel class's name or synonym"
            report.findings.append(Finding(kind, detail))
        elif verdict == "shared":
            shared.add(normalise_name(word))
    report.shared_synonyms = sorted(shared)
    report.counts |= {
        "images": len(train_ground_truth["images"]),
        "annotations": len(train_ground_truth["annotations"]),
        "categories": len(train_ground_truth["categories"]),
        "novel_categories": len(novel),
        "vocabulary_words": len(vocabulary_words),
    }
    if image_folder is not None:
        names = [i["file_name"] for i in train_ground_truth["images"] if i.get("file_name")]
        present = sum((Path(image_folder) / n).is_file() for n in names)
        report.counts |= {"pictures_present": present, "pictures_missing": len(names) - present}
    return report
