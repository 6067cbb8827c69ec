"""The command that exports: what is asked for is checked before anything is loaded, and the parts reach the library."""

import pytest


@pytest.fixture(scope="module")
def main(command):
    return command("export")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--output", "d.trt"), "does not end in .onnx or .pt2"),
        (("--output", "d.onnx", "--bake"), "give it with --vocabulary"),
        (("--output", "d.onnx", "--words", "w.npz"), "give it with --vocabulary"),
        (("--output", "d.onnx", "--vocabulary", "cat", "--words", "w.json"), "does not end in .npz"),
        (("--output", "towers", "--towers", "--vocabulary", "cat"), "writes no vocabulary"),
        (("--output", "d.onnx", "--weights", "no/such/folder"), "no/such/folder"),
    ],
)
def test_what_does_not_fit_together_is_one_sentence(main, capsys, arguments, message) -> None:
    assert main(list(arguments)) == 1
    printed = capsys.readouterr().err
    assert message in printed and printed.startswith("error: ") and printed.count("\n") == 1


def test_words_and_format_reach_the_exporter(main, monkeypatch, tmp_path, capsys) -> None:
    from ovd.export import files

    calls = []

    def write(detector, path, bake):
        calls.append((tuple(detector.vocabulary.words), bool(detector.competitors), bake))
        path.write_bytes(b"x")
        return path

    monkeypatch.setattr(files, "export_detector", write)
    words, output = tmp_path / "w.npz", tmp_path / "d.onnx"
    vocabulary = ["--vocabulary", "cat, taco", "--no-competitors"]
    assert main(["--output", str(output), *vocabulary, "--words", str(words), "--bake"]) == 0
    assert calls == [(("cat", "taco"), False, True)] and words.is_file()
    assert "2 words, 0 that compete" in capsys.readouterr().out
