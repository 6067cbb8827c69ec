"""What studies of towers and of detectors have in common: their file, the order of their jobs, and stored results.

A study here is a YAML file that names ways to train (specs), each trained with several seeds; a job is one spec with
one seed, and has a run folder. What a spec holds and how a job is judged is in `pretrain.engine.study` and
`ovd.engine.study`.
"""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar, get_type_hints

from omegaconf import OmegaConf

from pretrain.config import ConfigError, options_from_dict
from pretrain.parsing import check_yaml

RESULT_FILE = "result.json"


class Spec(Protocol):
    """One way to train; without seeds of its own it has the study's."""

    name: str
    seeds: list[int]


_COMMANDS = {"runs": "tools/study.py", "trainings": "tools/study_detector.py"}  # by what only its studies have


class Job(Protocol):
    """One spec with one seed."""

    @property
    def spec(self) -> Spec: ...


AnySpec = TypeVar("AnySpec", bound=Spec)
AnyJob = TypeVar("AnyJob", bound=Job)
Fields = TypeVar("Fields")


def read_study(path: Path, schema: type[Fields]) -> Fields:
    """Read a study file as the dataclass `schema`; what the values mean is not checked.

    Raises:
        ConfigError: for a missing file, text that is not YAML, an unknown field, or a study of the other command.
    """
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        raise ConfigError(f"no study file {path}{f'; did you mean {path.with_name(near[0])}?' if near else ''}")
    try:
        check_yaml(path.read_text(encoding="utf-8"))
        node = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # the YAML parser's own errors have many types
        raise ConfigError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from error
    for field, command in _COMMANDS.items():
        if isinstance(node, dict) and field in node and field not in get_type_hints(schema):
            raise ConfigError(f"{path} is a study of another kind, with {field}: give it to {command}")
    return options_from_dict(schema, node, "study")


def check_names(field: str, names: Sequence[str], nameless: str = "a name is missing") -> None:
    """Every entry of a list in a study file has a name of its own, and there is at least one.

    Args:
        field: of the study, for the message.
        nameless: the message's words for an entry without a name.

    Raises:
        ConfigError: otherwise.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names or "" in names or twice:
        raise ConfigError(f"study.{field}: {f'{twice[0]!r} occurs twice' if twice else nameless}; name each")


def in_order(specs: Sequence[AnySpec], seeds: Sequence[int]) -> Iterator[tuple[AnySpec, int]]:
    """Each spec with each of its seeds in the order to run them: one seed of everything first.

    Args:
        specs: at least one.
        seeds: of specs without seeds of their own.
    """
    for place in range(max(len(spec.seeds or seeds) for spec in specs)):
        for spec in specs:
            own = spec.seeds or seeds
            if place < len(own):
                yield spec, own[place]


def choose(jobs: Sequence[AnyJob], only: Iterable[str], kind: str) -> list[AnyJob]:
    """The jobs of the named specs; all where no name is given.

    Args:
        jobs: of a whole study.
        kind: what the study calls a spec, for the message.

    Raises:
        ConfigError: for a name that the study does not have.
    """
    only, names = list(only), list(dict.fromkeys(job.spec.name for job in jobs))
    for name in only:
        if name not in names:
            raise ConfigError(f"the study has no {kind} {name!r}: {', '.join(names)}")
    return [job for job in jobs if not only or job.spec.name in only]


def stored_result(folder: Path, kind: type[Fields]) -> Fields | None:
    """The result in a run folder as the dataclass `kind`, however it was judged; None where there is none to read."""
    try:
        return kind(**json.loads((folder / RESULT_FILE).read_text()))
    except (OSError, json.JSONDecodeError, TypeError):
        return None


def machines(described: Iterable[str]) -> str:
    """The machines of a study's results, each once; kept results of before say "1 threads"."""
    return "; ".join(sorted({re.sub(r"\b1 threads$", "1 thread", machine) for machine in described}))
