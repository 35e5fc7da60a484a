"""Pictures to batches: the model's own transform, labels, budgets."""

from __future__ import annotations

import io
import threading
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from examples import evaluated, study_of
from PIL.Image import Exif, Image, Transpose, fromarray
from PIL.Image import open as open_image

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.data import images
from ablation_sweeps.data.batch import Document, Picture, prefetch_batches
from ablation_sweeps.data.encoder import Budget
from ablation_sweeps.data.images import ImageEncoder
from ablation_sweeps.datasets.image_folder import ImageFolder
from ablation_sweeps.neurons.collect import collect
from ablation_sweeps.neurons.statistics import Histogram

NO_LIMIT = Budget(None, None)


def image(seed: int, size: int = 16, mode: str = "RGB") -> Image:
    shape = (size, size, 3) if mode == "RGB" else (size, size)
    return fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def pictures(n: int, **options) -> list[Picture]:
    return [Picture(f"p{i}", partial(image, i, **options), i % 5) for i in range(n)]


def encoded(model, given, budget=NO_LIMIT, batch_tokens=10):
    return model.encode(given, "evaluation", budget, batch_tokens, 0)


@pytest.mark.parametrize(("family", "key", "std"), [("vit", "pixel_values", 0.25), ("timm_vit", "x", 0.5)])
def test_pixels_are_scaled_as_the_model_wants_them(tiny, family, key, std):
    given = pictures(4)
    batches = encoded(tiny(family), given)
    pixels = torch.cat([batch.inputs[key] for batch in batches])
    expected = np.stack([np.asarray(p.read(), dtype=np.float64).transpose(2, 0, 1) / 255 for p in given])
    np.testing.assert_allclose(pixels, (expected - 0.5) / std, atol=1e-5)


def test_grey_pictures_get_the_models_colours(tiny):
    (batch,) = encoded(tiny("vit"), pictures(2, mode="L"))
    pixels = batch.inputs["pixel_values"]
    assert pixels.shape == (2, 3, 16, 16)
    assert torch.equal(pixels[:, 0], pixels[:, 1]) and torch.equal(pixels[:, 0], pixels[:, 2])


def test_pictures_stand_upright(tiny):
    """As cameras write it: the pixels as they fell, and how to turn them."""
    (upright,) = encoded(tiny("vit"), pictures(2))
    file = io.BytesIO()
    exif = Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    image(1).transpose(Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    (turned,) = encoded(tiny("vit"), [pictures(1)[0], Picture("p1", lambda: open_image(file), 1)])
    assert torch.equal(upright.inputs["pixel_values"], turned.inputs["pixel_values"])


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
def test_more_than_8_bits_a_pixel_are_refused(tiny, dtype):
    deep = fromarray((np.arange(256).reshape(16, 16) * 257).astype(dtype))
    with pytest.raises(
        UserError, match=r"the image deep cannot be used: more than 8 bits per pixel and channel .* with 8"
    ):
        encoded(tiny("vit"), [*pictures(2), Picture("deep", lambda: deep, 0)])


@pytest.mark.parametrize("names", [["0", "1", "2"], ["00", "01", "10"], ["a", "b10", "b2"], ["0", "1", "10", "2"]])
def test_folders_are_in_an_order_that_all_agree_on(tmp_path, names):
    for name in names:
        (tmp_path / name).mkdir()
        image(0).save(tmp_path / name / "x.png")
    if names[-1] != "2" or len(names) < 4:
        assert ImageFolder("images", str(tmp_path), "folder", None, 0.2).class_names() == names
        return
    with pytest.raises(UserError, match=r"its classes are numbers.*dataset\.classes=FILE"):
        ImageFolder("images", str(tmp_path), "folder", None, 0.2).class_names()
    (tmp_path / "order.txt").write_text("\n0\n1\n\n2\n10\n")  # blank lines are none
    listed = ImageFolder("images", str(tmp_path), "folder", str(tmp_path / "order.txt"), 0.2)
    assert listed.class_names() == ["0", "1", "2", "10"]
    assert {p.label for p in [*listed.examples("calibration"), *listed.examples("evaluation")]} == {0, 1, 2, 3}


def test_labels_names_and_order_are_those_of_the_dataset(tiny):
    batches = encoded(tiny("vit"), pictures(7))
    assert [i for batch in batches for i in batch.index] == list(range(7))
    assert [name for batch in batches for name in batch.names] == [f"p{i}" for i in range(7)]
    assert torch.cat([batch.labels for batch in batches]).tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert all(batch.keep is None for batch in batches)


@pytest.mark.parametrize("n", range(2, 9))
@pytest.mark.parametrize("batch_tokens", [1, 10, 15, 20, 1000])
def test_no_picture_is_left_alone(tiny, n, batch_tokens):
    batches = encoded(tiny("vit"), pictures(n), batch_tokens=batch_tokens)
    assert min(len(batch.names) for batch in batches) >= 2
    assert sum(len(batch.names) for batch in batches) == n
    size = max(2, batch_tokens // 5)
    assert all(len(batch.names) == size for batch in batches[:-1]) and len(batches[-1].names) <= size + 1


@pytest.mark.parametrize(("budget", "n"), [(Budget(None, 3), 3), (Budget(20, None), 4), (Budget(21, None), 5),
                                           (Budget(6, 5), 2), (Budget(600, 5), 5), (NO_LIMIT, 9)])  # fmt: skip
def test_a_budget_is_met(tiny, budget, n):
    assert sum(len(batch.names) for batch in encoded(tiny("vit"), pictures(9), budget)) == n


@pytest.mark.parametrize(("budget", "said"), [(Budget(47, None), ["45"]), (Budget(45, None), []), (Budget(47, 9), [])])
def test_less_calibration_data_than_asked_for_is_said(tiny, caplog, budget, said):
    caplog.set_level("INFO", "ablation_sweeps")
    tiny("vit").encode(pictures(9), "calibration", budget, 10, 0)
    expected = [
        f"statistics.tokens={budget.tokens}: the calibration data have only {n}, and all are used" for n in said
    ]
    assert caplog.messages == expected


def test_a_label_that_the_model_does_not_know_is_refused(tiny):
    for family in ("vit", "timm_vit"):
        with pytest.raises(UserError, match=r"odd has class 5, but the model knows 5 classes.*dataset\.classes"):
            encoded(tiny(family), [*pictures(3), Picture("odd", partial(image, 0), 5)])


def test_texts_and_nothing_at_all_are_refused(tiny):
    with pytest.raises(UserError, match="needs images"):
        encoded(tiny("vit"), [Document("a", "text")])
    with pytest.raises(UserError, match="no images"):
        encoded(tiny("vit"), [])


def test_random_pixels_go_through_the_models_transform():
    seen = []

    def transform(picture: Image) -> torch.Tensor:
        seen.append(np.asarray(picture))
        return torch.from_numpy(np.asarray(picture).copy())

    for mode, shape in (("RGB", (256, 256, 3)), ("L", (256, 256))):
        batch = ImageEncoder(transform, "x", mode, 5, 1).other_input("random_pixels", 1, 0)
        assert batch.inputs["x"].shape == (1, *shape)
        counts = np.bincount(seen[-1].ravel(), minlength=256)
        assert counts.min() > 0.5 * counts.mean()  # all values, evenly
    with pytest.raises(UserError, match="random_pixels"):
        ImageEncoder(transform, "x", "L", 5, 1).other_input("random_tokens", 1, 0)


@pytest.mark.parametrize(("family", "n_tokens"), [("vit", 4 + 1), ("timm_vit", 4 + 1)])
def test_cls_can_be_left_out_of_the_statistics(fresh, site, family, n_tokens):
    from ablation_sweeps.neurons import sites
    from ablation_sweeps.neurons.collect import CalibrationData, moments_of

    model = fresh(family, tokens="no_special")
    batches = model.encode(pictures(3), "calibration", NO_LIMIT, 1000, 0)
    assert [batch.keep.tolist() for batch in batches] == [[[False, *[True] * (n_tokens - 1)]] * 3]
    assert all(batch.keep is None for batch in encoded(model, pictures(3)))
    projections = sites.find(model, site("attn_pre_out"), None)
    every = model.encode(pictures(3), "evaluation", NO_LIMIT, 1000, 0)
    found = [moments_of(CalibrationData(model, projections, of), "") for of in (batches, every)]
    for some, all_ in zip(*found, strict=True):
        assert (some.n, all_.n) == (3 * (n_tokens - 1), 3 * n_tokens)
        assert not torch.equal(some.total, all_.total)


def test_as_many_patches_enter_the_statistics_as_were_asked_for(fresh):
    """The image that meets the budget is the last one: 5 positions each, of which one does not count."""
    model = fresh("vit", tokens="no_special")
    for tokens, n_images in ((8, 2), (9, 3), (20, 5)):
        batches = model.encode(pictures(9), "calibration", Budget(tokens, None), 1000, 0)
        assert sum(len(batch.names) for batch in batches) == n_images
        assert sum(int(batch.keep.sum()) for batch in batches) == 4 * n_images


def test_windows_have_no_cls(fresh):
    (batch, *_) = fresh("timm_swin", tokens="no_special").encode(pictures(2, size=32), "calibration", NO_LIMIT, 1000, 0)
    assert batch.keep is None


def counting(n: int) -> tuple[list[Picture], list[str]]:
    read: list[str] = []

    def open_(i: int) -> Image:
        read.append(f"p{i}")
        return image(i)

    return [Picture(f"p{i}", partial(open_, i), i % 5) for i in range(n)], read


def test_pixels_that_do_not_fit_into_memory_are_made_when_they_are_needed(tiny, monkeypatch):
    """A batch of two, and one more picture: the first batch stays, the others are read once in each pass."""
    model = tiny("vit")
    given, read = counting(7)
    whole = encoded(model, given)
    assert sorted(read) == [f"p{i}" for i in range(7)]
    monkeypatch.setattr(images, "MAX_PIXEL_BYTES", 3 * 3 * 16 * 16 * 4)
    read.clear()
    some = encoded(model, given)
    assert sorted(read) == ["p0", "p1", "p2"]  # as many as fit, of which the last one's batch does not
    read.clear()
    for a, b in zip(prefetch_batches(whole), prefetch_batches(some), strict=True):
        assert torch.equal(a.inputs["pixel_values"], b.inputs["pixel_values"])
        assert (a.names, a.index, a.labels.tolist()) == (b.names, b.index, b.labels.tolist())
    assert sorted(read) == [f"p{i}" for i in range(2, 7)]


def test_a_sweep_gives_the_same_whether_pixels_stay_in_memory_or_not(tiny, site, tmp_path, monkeypatch):
    model, found = tiny("timm_vit"), []
    for room in (images.MAX_PIXEL_BYTES, 0):
        monkeypatch.setattr(images, "MAX_PIXEL_BYTES", room)
        study = study_of(model, site, 0, encoded(model, pictures(9)))
        statistics = collect(model, study["projections"], study["batches"], tmp_path / str(room), Histogram(10))
        found.append((statistics, evaluated(study)))
    (kept, kept_sums), (made, made_sums) = found
    for a, b in zip(kept.counts[Histogram(10)], made.counts[Histogram(10)], strict=True):
        assert torch.equal(a, b)
    pd.testing.assert_frame_equal(kept_sums, made_sums, check_exact=True)


def test_the_next_batch_is_made_while_one_is_computed_with(tiny, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXEL_BYTES", 0)
    fourth_read, (given, read) = threading.Event(), counting(8)
    given[3] = Picture("p3", lambda: fourth_read.set() or image(3), 3)
    batches = encoded(tiny("vit"), given)
    seen = []
    for batch in prefetch_batches(batches):
        if not seen:
            assert fourth_read.wait(10), "nobody works ahead"
            assert not {"p4", "p6"} & set(read), "too far ahead"
        seen += batch.names
    assert seen == [f"p{i}" for i in range(8)]


def test_a_picture_that_is_not_whole_stops_the_pass_at_its_batch(tiny, monkeypatch):
    def broken() -> Image:
        raise UserError("dataset.path: p3 is no whole image")

    monkeypatch.setattr(images, "MAX_PIXEL_BYTES", 0)
    given = pictures(6)
    given[3] = Picture("p3", broken, 3)
    done = []
    with pytest.raises(UserError, match="p3 is no whole image"):
        for batch in prefetch_batches(encoded(tiny("vit"), given)):
            done += batch.names
    assert done == ["p0", "p1"]
