"""open_clip's byte-pair tokenizer at a given length. Its vocabulary is in the wheel, so it works offline."""

from open_clip import SimpleTokenizer

_KEPT_WORDS = 200_000  # about 40 MB; real text repeats far fewer


class CachedTokenizer(SimpleTokenizer):
    """open_clip's tokenizer, the same tokens in half the time: at 64 px the text costs as much as the resizing."""

    def __init__(self, context_length: int):
        super().__init__(context_length=context_length)
        self._ids: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token numbers of a text, without start and end."""
        # open_clip's cleaning repairs encodings, entities and control characters; plain text has none of them.
        plain = text.isascii() and text.isprintable() and "&" not in text
        text = " ".join(text.split()).lower() if plain else self.clean_fn(text)
        tokens: list[int] = []
        for word in self.pat.findall(text):
            ids = self._ids.get(word)
            if ids is None:
                if len(self._ids) >= _KEPT_WORDS:
                    self._ids.clear()
                characters = "".join(self.byte_encoder[byte] for byte in word.encode())
                ids = self._ids[word] = [self.encoder[piece] for piece in self.bpe(characters).split(" ")]
            tokens += ids
        return tokens


def build_tokenizer(context_length: int) -> SimpleTokenizer:
    """Texts to (N, context_length) int64: start token, words, end token, zeros. A long text is cut and keeps its end
    token, whose feature is the text's."""
    return CachedTokenizer(context_length)
