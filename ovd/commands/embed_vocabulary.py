"""Embed words with a model's text tower, keep them in a file that knows what made it, and say what is wrong with them.

python tools/embed_vocabulary.py --checkpoint mini --vocabulary words.txt --output words.safetensors
ovd-demo --weights mini --vocabulary words.safetensors --input pictures/
"""

import argparse
from pathlib import Path

from pretrain.commands.outcome import exit_status


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="DIR",
        help="a detector's folder or name (mini), or a checkpoint",
    )
    add("--vocabulary", required=True, metavar="WORDS", help='"koala, taco", or a .txt or (LVIS, COCO) .json file')
    add("--output", required=True, type=Path, metavar="FILE", help="file to write, ends in .safetensors")
    add("--templates", type=Path, metavar="FILE", help="prompts with {}, one a line (default: the detector's own)")
    add("--no-synonyms", action="store_true", help="embed names only, not the synonyms of a .json file")
    add("--threshold", type=float, default=0.95, help="cosine of near-duplicates (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    return parser.parse_args(arguments)


def find_folder(checkpoint: Path) -> Path:
    """The folder of a checkpoint or of a detector, which may be one that ships under that name.

    Raises:
        ConfigError: it is neither.
    """
    from ovd.detector_folder import CONFIG, detector_folder, shipped_names
    from pretrain.config import ConfigError
    from pretrain.modeling.checkpoint import CONFIG_FILE

    if any((checkpoint / name).is_file() for name in (CONFIG, CONFIG_FILE)):
        return checkpoint
    try:
        return detector_folder(checkpoint)
    except ConfigError as error:
        names = ", ".join(shipped_names()) or "none"
        raise ConfigError(
            f"{checkpoint} is neither a detector nor a checkpoint folder: give one with {CONFIG} or {CONFIG_FILE}, or "
            f"the name of a detector that ships ({names})"
        ) from error


def run(options: argparse.Namespace) -> None:
    """Embed, write, diagnose."""
    # Cheap checks first: a mistyped path should not have to wait for the network to load.
    from ovd.text.vocabulary import Vocabulary

    if options.output.suffix.lower() != ".safetensors":
        raise ValueError(f"output {options.output} does not end in .safetensors, by which it is recognised; name it so")
    vocabulary = Vocabulary.parse(options.vocabulary)

    import warnings

    from ovd.detector_folder import CONFIG, IMAGE_TEXT, read_prompting
    from ovd.text.diagnostics import background_of, diagnose_vocabulary
    from ovd.text.embedding_file import save_embeddings
    from ovd.text.embeddings import Prompting, embed_vocabulary, read_templates
    from pretrain.engine.device import Device
    from pretrain.modeling.checkpoint import load_checkpoint

    folder = find_folder(options.checkpoint)
    own = read_prompting(folder) if (folder / CONFIG).is_file() else Prompting()
    templates = read_templates(options.templates) if options.templates else own.templates
    synonyms = own.use_synonyms and not options.no_synonyms
    inner = folder / IMAGE_TEXT
    model = load_checkpoint(inner if inner.is_dir() else folder, Device(options.device).torch_device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* are cut short", category=UserWarning)  # in the diagnosis below
        embeddings = embed_vocabulary(vocabulary, model, templates, synonyms)
    background, source = background_of(folder, model)
    findings = diagnose_vocabulary(
        vocabulary, embeddings, model.tokenizer, templates, synonyms, background, options.threshold
    )
    save_embeddings(options.output, embeddings, vocabulary, model, templates, synonyms)
    print(findings.to_text(), end="")
    print(f"background: {source}")
    print(f"embeddings: {options.output} ({len(vocabulary)} words, {model.embed_dim} dimensions)")


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; what a user can mend is one sentence on stderr."""
    options = parse(arguments)
    return exit_status(lambda: run(options), "interrupted; nothing was written")
