"""Write a detector, or the towers of its image-text model, as files that run without this package.

python tools/export.py --output detector.onnx --vocabulary "cat, taco" --words words.npz
python tools/export.py --output cats.onnx --vocabulary "cat" --bake
python tools/export.py --towers --output towers/
"""

import argparse
import sys
from pathlib import Path

# Python puts this folder first on the path, where `pretrain.py` would pass for the package `pretrain`.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.commands.outcome import exit_status  # noqa: E402


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", default="mini", metavar="DIR", help="detector folder, or a name that ships (default: %(default)s)")
    add("--output", required=True, type=Path, metavar="PATH", help="file to write, .onnx or .pt2; a folder of towers")
    add("--vocabulary", metavar="WORDS", help='"koala, taco", or a .txt (a word a line) or .json file')
    add("--embeddings", type=Path, metavar="FILE", help="file of tools/embed_vocabulary.py, or .npy with --vocabulary")
    add("--no-competitors", action="store_true", help="categories trained on do not compete with the words")
    add("--bake", action="store_true", help="put the vocabulary into the file; otherwise it is an input")
    add("--words", type=Path, metavar="FILE.npz", help="write the vocabulary as the inputs of an exported detector")
    add("--towers", action="store_true", help="write the image tower and the text tower instead of the detector")
    add("--format", choices=("onnx", "pt2"), default="onnx", help="of the towers (default: %(default)s)")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Cheap checks first: a mistake should not have to wait for the network to load."""
    given = options.vocabulary or options.embeddings
    if options.bake and not given:
        raise ValueError("--bake puts a vocabulary into the file; give it with --vocabulary or --embeddings")
    if options.words and not given:
        raise ValueError("--words writes a vocabulary; give it with --vocabulary or --embeddings")
    if options.towers and (options.bake or options.words or given):
        raise ValueError("--towers writes no vocabulary; leave --vocabulary, --embeddings, --bake and --words out")
    if not options.towers and options.output.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"output {options.output} does not end in .onnx or .pt2, which names the format; name it so")
    if options.words and options.words.suffix != ".npz":
        raise ValueError(f"words {options.words} does not end in .npz; name it so")


def size_of(path: Path) -> str:
    """A path with the size of its file."""
    return f"{path} ({path.stat().st_size / 2**20:.1f} MB)"


def run(options: argparse.Namespace) -> None:
    """Load, export, print where the output went."""
    check(options)
    from ovd.commands.quiet import quieten_libraries
    from ovd.detector import OpenVocabularyDetector
    from ovd.export.files import export_detector, export_towers, save_vocabulary

    quieten_libraries()
    is_folder = Path(options.weights).is_dir() or "/" in options.weights
    load = OpenVocabularyDetector.from_checkpoint if is_folder else OpenVocabularyDetector.from_pretrained
    detector = load(options.weights)
    if options.towers:
        for path in export_towers(detector.image_text, options.output, f".{options.format}"):
            print(f"tower: {size_of(path)}")
        return
    if options.vocabulary or options.embeddings:
        detector.set_vocabulary(
            options.vocabulary, embeddings=options.embeddings, competitors=not options.no_competitors
        )
    if options.words:
        count = f"{len(detector.vocabulary)} words, {len(detector.competitors)} that compete"
        print(f"vocabulary: {save_vocabulary(detector, options.words)} ({count})")
    print("tracing the detector; this takes a minute or two", file=sys.stderr)
    path = export_detector(detector, options.output, options.bake)
    print(f"detector: {size_of(path)}")
    print(f"description: {path.with_suffix('.json')}")


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; what a user can mend is one sentence on stderr."""
    options = parse(arguments)
    return exit_status(lambda: run(options), "interrupted; no incomplete file was left")


if __name__ == "__main__":
    sys.exit(main())
