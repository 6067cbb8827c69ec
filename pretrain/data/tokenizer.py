"""open_clip's byte-pair tokenizer at a given length. Its vocabulary is in the wheel, so it works offline."""

from open_clip import SimpleTokenizer


def build_tokenizer(context_length: int) -> SimpleTokenizer:
    """Texts to (N, context_length) int64: start token, words, end token, zeros. A long text is cut and keeps its end
    token, whose feature is the text's."""
    return SimpleTokenizer(context_length=context_length)
