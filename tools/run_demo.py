"""The whole way on real input, as `make demo` runs it: data, pretraining, detector, evaluation, pictures, one table.

Every stage is one of this folder's other commands, printed before it runs; a finished stage is not run twice.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

# Python puts this folder first on the path, where `pretrain.py` would pass for the package `pretrain`.
ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

PRETRAIN = "configs/pretrain/reclip_mini.yaml"
DETECTOR = "configs/ovd/mini_lvis.py"
TEST = "data/mini/mini_lvis_test.json"
TOWERS = Path("runs/pretrain_mini/checkpoint")
TRAINED = Path("runs/detector_mini")
KEPT = Path("ovd/weights/mini")
KEPT_RUN = Path("runs/kept")
SURE, LEAST_SURE = 0.5, 0.1  # lowest scores drawn: of the kept weights, calibrated, and of ones trained for minutes
SCENES, SHOWN = 100, 12  # pictures searched for novel words, and the most confident ones among them


def step(title: str, *command: str, done: Path | None = None, output: Path | None = None) -> None:
    """Run a command of this folder and show it; skip it if `done` exists; its standard output can go to a file.

    Raises:
        SystemExit: if the command fails; its own message is above.
    """
    if done is not None and done.exists():
        print(f"\n== {title}: already there ({done})", flush=True)
        return
    print(f"\n== {title}\n$ python {' '.join(command)}", flush=True)
    started = time.perf_counter()
    result = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE if output else None, text=True)
    if result.returncode:
        raise SystemExit(f"make demo stopped: '{title}' failed, see above; run it again after the remedy, it continues")
    if output:
        from pretrain.atomic import write_atomically

        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, result.stdout)
    print(f"   {time.perf_counter() - started:.0f} s", flush=True)


def train_both(trained: bool) -> None:
    """Build the data and train both halves with the preset for two cores."""
    step("data", "tools/prepare_data.py", "mini")
    if not trained:
        return
    resume = ["--resume"] if (TOWERS.parent / "state.pt").exists() else []
    step(
        "pretraining: small images, then larger ones",
        "tools/pretrain.py",
        "--config",
        PRETRAIN,
        *resume,
        done=TOWERS,
    )
    resume = ["--resume"] if (TRAINED / "last_checkpoint").exists() else []
    step(
        "detector: base classes only, then LVIS evaluation with the shuffled control",
        "tools/train_net.py", "--config", DETECTOR, *resume, done=TRAINED / "summary.md",
    )  # fmt: skip


def measure(label: str, towers: Path, detector: Path, run: Path, threshold: float) -> None:
    """Zero-shot accuracy on the unseen vendor, LVIS evaluation, and pictures for words that were never trained on."""
    step(
        f"zero-shot, {label}", "tools/evaluate.py", "--checkpoint", str(towers), "--split", "test", "--json",
        output=run / "zero_shot.json",
    )  # fmt: skip
    step(
        f"LVIS evaluation, {label}", "tools/train_net.py", "--config", DETECTOR, "--eval-only",
        "--detector", str(detector), f"train.output={run}", done=run / "summary.md",
    )  # fmt: skip
    from ovd.showcase import novel_scenes, write_grid

    pictures, words = novel_scenes(TEST, "data/mini", SCENES)
    step(
        f"pictures, {label}: words that were never trained on", "tools/demo.py", "--input", *pictures,
        "--vocabulary", ", ".join(words), "--weights", str(detector), "--output", f"demo/{run.name}",
        "--threshold", str(threshold),
    )  # fmt: skip
    write_grid(f"demo/{run.name}", f"demo/{run.name}.png", SHOWN)
    step(
        f"report, {label}", "tools/report.py", str(run), "--output", f"demo/{run.name}.html", "--annotations", TEST,
        "--image-root", "data/mini",
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run every stage and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kept-only", action="store_true", help="no training: only the weights in the repository")
    options = parser.parse_args(arguments)

    from ovd.showcase import table
    from pretrain.atomic import write_atomically

    started = time.perf_counter()
    train_both(trained=not options.kept_only)
    runs = {} if options.kept_only else {"trained just now": (TOWERS, TRAINED / "detector", TRAINED, LEAST_SURE)}
    if (KEPT / "config.yaml").exists():
        runs["kept weights"] = (KEPT / "image_text", KEPT, KEPT_RUN, SURE)
    for label, paths in runs.items():
        measure(label, *paths)
    text = table({label: paths[2] for label, paths in runs.items()})
    write_atomically(Path("demo/table.md"), text)
    print(f"\n{text}\nOn a vendor whose drawings were never seen; r = classes never trained on by the detector.")
    for _, _, run, threshold in runs.values():
        print(
            f"pictures: demo/{run.name}.png (at most {SHOWN} with a score of {threshold:g} or more, surest first, "
            f"right or wrong); all in demo/{run.name}/"
        )
        print(f"report:   demo/{run.name}.html")
    print("table:    demo/table.md")
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
