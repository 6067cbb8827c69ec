"""How a command ends: status and the one sentence on stderr."""

import pytest

from pretrain.commands.outcome import exit_status
from pretrain.config import ConfigError
from pretrain.modeling.checkpoint import CheckpointError


def raising(error: BaseException):
    def work():
        raise error

    return work


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (1, 1)])
def test_the_status_is_the_works_own(returned, status, capsys):
    assert exit_status(lambda: returned, "interrupted") == status
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, ConfigError, CheckpointError])
def test_what_a_user_can_mend_is_one_sentence(error, capsys):
    assert exit_status(raising(error("no such word"))) == 1
    assert capsys.readouterr() == ("", "error: no such word\n")


def test_which_errors_are_mendable_can_be_said(capsys):
    assert exit_status(raising(FloatingPointError("not finite")), mendable=(FloatingPointError,)) == 1
    assert capsys.readouterr().err == "error: not finite\n"
    with pytest.raises(ValueError, match="a mistake"):
        exit_status(raising(ValueError("a mistake")), mendable=(ConfigError, OSError))


@pytest.mark.parametrize(("said", "printed"), [("interrupted; go on", "\ninterrupted; go on\n"), ("", "")])
def test_an_interruption_is_130(said, printed, capsys):
    assert exit_status(raising(KeyboardInterrupt()), said) == 130
    assert capsys.readouterr() == ("", printed)
