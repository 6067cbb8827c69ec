"""What studies of towers and of detectors have in common: their file, the order of their jobs, and stored results.

A study here is a YAML file that names ways to train (specs), each trained with several seeds; a job is one spec with
one seed, and has a run folder. What a spec holds and how a job is judged is in `pretrain.engine.study` and
`ovd.engine.study`.
"""

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from omegaconf import OmegaConf

from pretrain.config import ConfigError, options_from_dict
from pretrain.parsing import check_yaml

RESULT_FILE = "result.json"


class Spec(Protocol):
    """One way to train; without seeds of its own it has the study's."""

    name: str
    seeds: list[int]


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
        ConfigError: for a missing file, text that is not YAML, or an unknown field.
    """
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        raise ConfigError(f"no study file {path}{f'; did you mean {path.with_name(near[0])}?' if near else ''}")
    try:
        check_yaml(path.read_text(encoding="utf-8"))
        node = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # the YAML parser's own errors have many types
        raise ConfigError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from error
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
