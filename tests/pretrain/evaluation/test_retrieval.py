"""Retrieval with several captions an image: hand-made matrices, Karpathy's JSON, broken images."""

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pretrain.config import ConfigError
from pretrain.data.folder import ImageStore
from pretrain.data.tokenizer import build_tokenizer
from pretrain.evaluation.encoder import OWN_PREPROCESS, Encoder
from pretrain.evaluation.ranking import expected_hits
from pretrain.evaluation.retrieval import CaptionedImages, RetrievalResult, evaluate_retrieval, read_karpathy, recalls
from pretrain.modeling.clip import set_image_size

# Four images, eight captions; captions 2i and 2i+1 are image i's. Larger is nearer.
OWNERS = torch.arange(8) // 2
SCORES = torch.tensor(
    [
        [9, 1, 2, 3, 4, 5, 6, 7],  # own 9 and 1: the first of all                  -> place 0
        [3, 4, 8, 9, 5, 2, 1, 0],  # own 8 and 9: the first of all                  -> place 0
        [9, 8, 7, 6, 5, 1, 0, 2],  # own 5 and 1: behind 9 8 7 6                    -> place 4
        [7, 6, 5, 4, 3, 2, 0, 1],  # own 0 and 1: behind 7 6 5 4 3 2                -> place 6
    ]
).float()


def test_an_image_is_found_by_the_best_of_its_captions():
    right = torch.arange(4)[:, None] == OWNERS
    found = {k: float(expected_hits(SCORES, right, k).mean()) for k in (1, 4, 5, 6, 7, 10)}
    assert found == {1: 0.5, 4: 0.5, 5: 0.75, 6: 0.75, 7: 1.0, 10: 1.0}


def test_a_caption_is_found_by_its_one_image():
    """Places of the own image in the columns: (9 3 9 7) is tied for first, 1 -> 3, 8 -> 0, 9 -> 0, 5 (4 5 5 3) tied for
    first, 1 (5 2 1 2) -> 3, 0 (6 1 0 0) tied for place 2 with one other, 1 (7 0 2 1) -> 2."""
    right = OWNERS[:, None] == torch.arange(4)
    found = {k: expected_hits(SCORES.T, right, k).tolist() for k in (1, 3)}
    assert found[1] == [0.5, 0, 1, 1, 0.5, 0, 0, 0]
    assert found[3] == [1, 0, 1, 1, 1, 0, 0.5, 1]


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_recalls_equal_a_naive_sort_in_any_chunking(chunk):
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(20, 8, generator=generator), dim=-1)
    owners = torch.arange(20).repeat_interleave(5)
    texts = F.normalize(images[owners] + 1.5 * torch.randn(100, 8, generator=generator), dim=-1)
    places, order = torch.arange(20), torch.randperm(100, generator=generator)
    texts, owners = texts[order], owners[order]
    scores = (images @ texts.T).tolist()
    forward, backward = [], []
    for i in range(20):
        ranked = sorted(range(100), key=lambda t: -scores[i][t])
        forward.append(next(place for place, t in enumerate(ranked) if owners[t] == i))
    for t in range(100):
        backward.append(sorted(range(20), key=lambda i: -scores[i][t]).index(int(owners[t])))
    expected = [{k: sum(p < k for p in found) / len(found) for k in (1, 5, 10)} for found in (forward, backward)]
    assert recalls(images, texts, places, owners, chunk) == pytest.approx(expected[0])
    assert recalls(texts, images, owners, places, chunk) == pytest.approx(expected[1])
    assert 0 < expected[0][1] < expected[0][5] <= 1


def test_one_number_is_the_mean_of_the_two_first_places():
    result = RetrievalResult({1: 0.4, 5: 0.6, 10: 0.7}, {1: 0.2, 5: 0.5, 10: 0.6}, 10, 50, 1)
    assert result.mean_recall_at_1 == pytest.approx(0.3)
    assert result.to_dict()["mean_r1"] == pytest.approx(0.3) and result.to_dict()["text_to_image_r5"] == 0.5


def entry(split, filename, captions, **more):
    return {"split": split, "filename": filename, "sentences": [{"raw": text} for text in captions], **more}


@pytest.fixture
def coco(tmp_path):
    """Karpathy's layout with COCO's sub-folder, seven captions once, an empty one, and an image without any."""
    entries = [
        entry("test", "a.png", [f"red thing {i}" for i in range(7)], filepath="val2014"),
        entry("train", "b.png", ["no"], filepath="train2014"),
        entry("test", "c.png", ["", "  blue thing "], filepath="val2014"),
        entry("test", "d.png", [" "], filepath="val2014"),
    ]
    (tmp_path / "val2014").mkdir()
    for name, colour in (("a.png", (250, 20, 10)), ("c.png", (20, 10, 250))):
        Image.new("RGB", (40, 30), colour).save(tmp_path / "val2014" / name)
    (tmp_path / "coco.json").write_text(json.dumps({"images": entries, "dataset": "coco"}))
    return tmp_path / "coco.json"


def test_the_test_split_is_read_with_five_captions_an_image(coco):
    data = read_karpathy(coco, coco.parent)
    assert data.images == ["val2014/a.png", "val2014/c.png"] and data.left_out == 2
    assert data.owners == [0] * 5 + [1] and data.captions[4:] == ["red thing 4", "blue thing"]
    assert read_karpathy(coco, coco.parent, captions_per_image=0).owners == [0] * 7 + [1]


def test_images_may_lie_in_one_folder_or_have_no_sub_folder(coco, tmp_path):
    assert read_karpathy(coco, coco.parent / "val2014").images == ["a.png", "c.png"]
    (tmp_path / "flickr.json").write_text(json.dumps({"images": [entry("test", "1.jpg", ["x"])]}))
    assert read_karpathy(tmp_path / "flickr.json", tmp_path).images == ["1.jpg"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no captions at"),
        ("{", "is not a JSON of Karpathy's splits"),
        ('{"images": [{"split": "test", "sentences": []}]}', "is not a JSON of Karpathy's splits .* 'filename'"),
        ('{"images": [{"split": "val"}]}', "no image of split 'test'; its splits: val"),
        ('{"images": [{"split": "test", "filename": "a", "sentences": []}]}', "no image of split 'test' has a caption"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, content, message):
    path = tmp_path / "captions.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_karpathy(path, tmp_path)
    assert str(path) in str(caught.value)


def toy_encoder(model):
    """Images by their mean colour, texts by the colour word in them; no learning involved."""
    words = {"red": (1.0, 0, 0), "green": (0, 1.0, 0), "blue": (0, 0, 1.0)}
    prompts = []

    def tokenizer(texts):
        prompts.extend(texts)
        return torch.tensor([words[next(word for word in text.split() if word in words)] for text in texts])

    set_image_size(model, 32)
    model.encode_text = lambda tokens: tokens
    model.encode_image = lambda images: images.mean((2, 3))
    preprocess = {**OWN_PREPROCESS, "mean": (0, 0, 0), "std": (1, 1, 1)}
    return Encoder(model, tokenizer, preprocess, torch.device("cpu"), batch_size=2), prompts


def test_the_right_model_finds_everything_and_the_template_is_used(model, coco):
    encoder, prompts = toy_encoder(model)
    data = read_karpathy(coco, coco.parent)
    result = evaluate_retrieval(encoder, data, ImageStore(coco.parent), ["a photo of {}"])
    assert result.image_to_text == result.text_to_image == {1: 1, 5: 1, 10: 1}
    assert (result.images, result.captions, result.broken) == (2, 6, 0)
    assert prompts[-1] == "a photo of blue thing"
    with pytest.raises(ConfigError, match="one template"):
        evaluate_retrieval(encoder, data, ImageStore(coco.parent), ["{}", "a {}"])


def test_a_broken_image_leaves_with_its_captions(model, coco):
    """With the image of the two green captions gone, the rest is as if they had never been there."""
    data = read_karpathy(coco, coco.parent)
    (coco.parent / "cut.png").write_bytes(b"\x89PNG")
    more = CaptionedImages(
        ["cut.png", *data.images], ["a green one", "green", *data.captions], [0, 0, *[o + 1 for o in data.owners]], 0
    )
    result = evaluate_retrieval(toy_encoder(model)[0], more, ImageStore(coco.parent))
    assert (result.images, result.captions, result.broken) == (2, 6, 1)
    assert result.image_to_text == result.text_to_image == {1: 1, 5: 1, 10: 1}


def test_a_model_that_knows_nothing_gets_chance(model, coco):
    encoder, _ = toy_encoder(model)
    encoder.tokenizer = build_tokenizer(8)
    model.encode_text = lambda tokens: torch.ones(len(tokens), 3)
    result = evaluate_retrieval(encoder, read_karpathy(coco, coco.parent), ImageStore(coco.parent))
    assert result.text_to_image[1] == pytest.approx(1 / 2)
    assert result.image_to_text[1] == pytest.approx((5 / 6 + 1 / 6) / 2)
