"""Datasets of the hub, through the same code, against small local copies in the same formats."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import PIL.Image
import pytest

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.hashing import unit_hash
from ablation_sweeps.datasets import hub_rows

KINDS = ("Github", "Pile-CC", "ArXiv")
PILE = [(f"text {i} of {KINDS[i % 3]}", KINDS[i % 3]) for i in range(30)]
ARTICLES = {"train": [3, 1, 2, 4, 2, 1], "validation": [2], "test": [2, 3, 1, 1]}  # lines under each heading
N_IMAGES = {"train": 24, "validation": 18, "test": 18}


def write_parquet(path: Path, columns: dict[str, list], features=None) -> None:
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)


def write_pile(folder: Path) -> None:
    import zstandard

    records = [json.dumps({"text": text, "meta": {"pile_set_name": kind}}) for text, kind in PILE]
    for name, lines in {"train/00": records[:10], "train/01": records[10:20], "test": records[20:]}.items():
        file = folder / f"{name}.jsonl.zst"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(zstandard.ZstdCompressor().compress("\n".join(lines).encode()))


def write_wikitext(folder: Path) -> None:
    lines = {}
    for split, articles in ARTICLES.items():
        lines[split] = [""]
        for i, n in enumerate(articles):
            lines[split] += [f" = {split} {i} = \n", "", *[f" Line {k} of article {i} . \n" for k in range(n)],
                             " = = Section = = \n"]  # fmt: skip
    for config in ("wikitext-2-raw-v1", "wikitext-103-raw-v1"):
        for split, text in lines.items():
            more = text if config.startswith("wikitext-2") else ["not this one"]
            write_parquet(folder / config / f"{split}-00000-of-00001.parquet", {"text": more})
    configs = [f"- config_name: {config}\n  data_files:\n" + "".join(
        f"  - split: {split}\n    path: {config}/{split}-*\n" for split in lines)
        for config in ("wikitext-103-raw-v1", "wikitext-2-raw-v1")]  # fmt: skip
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")


def write_c4(folder: Path) -> None:
    (folder / "en").mkdir(parents=True)
    for split, first in {"train": 0, "validation": 100}.items():
        lines = [json.dumps({"text": f"page {first + i}", "timestamp": "t", "url": "u"}) for i in range(12)]
        (folder / "en" / f"c4-{split}.00000-of-00001.json.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en/c4-train.*.json.gz\n"
        "  - split: validation\n    path: en/c4-validation.*.json.gz\n---\n"
    )


def write_stories(folder: Path) -> None:
    for split in ("train", "validation"):
        stories = {"text": [f"{split} story {i}" for i in range(9)]}
        write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", stories)


def write_images(folder: Path, image: str, label: str, n_classes: int, splits: tuple[str, ...]) -> None:
    import datasets

    names = [f"class {i}" for i in range(n_classes)]
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=names)})
    for split in splits:
        n = N_IMAGES[split]
        pictures = []
        for i in range(n):
            buffer = io.BytesIO()
            PIL.Image.new("RGB", (16, 16), (10 * i, i, 200)).save(buffer, format="PNG")
            pictures.append({"bytes": buffer.getvalue(), "path": None})
        labels = [(7 * i + (split == "train")) % n_classes for i in range(n)]
        write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", {image: pictures, label: labels}, features)


WRITE: dict[str, Callable[[Path], None]] = {
    "pile": write_pile,
    "wikitext": write_wikitext,
    "c4": write_c4,
    "tiny_stories": write_stories,
    "imagenet_1k": lambda folder: write_images(folder, "image", "label", 1000, ("train", "validation", "test")),
    "cifar10": lambda folder: write_images(folder, "img", "label", 10, ("train", "test")),
    "cifar100": lambda folder: write_images(folder, "img", "fine_label", 100, ("train", "test")),
}
FORMAT = {"pile_no_code": "pile", "code": "pile"}
ALL = [*WRITE, *FORMAT]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub_rows._load.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[str], Path]:
    def copy_of(name: str) -> Path:
        folder = tmp_path / FORMAT.get(name, name)
        if not folder.exists():
            WRITE[FORMAT.get(name, name)](folder)
        return folder

    return copy_of


@pytest.fixture
def dataset(job_of, copy_of):
    """`dataset("pile", "only=[ArXiv]")`: the option of conf/, pointed at a local copy."""

    def dataset(name: str, *overrides: str, path: Path | None = None):
        options = [f"dataset={name}", f"dataset.path={path or copy_of(name)}", *(f"dataset.{o}" for o in overrides)]
        return job_of(*options).dataset

    return dataset


def texts(dataset, split: str) -> list[str]:
    return [document.text for document in dataset.examples(split)]


# Every option of conf/ reads its format


@pytest.mark.parametrize("name", ALL)
def test_calibration_and_evaluation_are_there_apart_and_in_one_order(dataset, name):
    examples = {split: list(dataset(name).examples(split)) for split in ("calibration", "evaluation")}
    names = {split: {example.name for example in found} for split, found in examples.items()}
    assert [example.name for example in dataset(name).examples("evaluation")] == [
        e.name for e in examples["evaluation"]
    ]
    assert all(len(names[split]) == len(examples[split]) > 2 for split in names)
    assert not names["calibration"] & names["evaluation"]


def test_the_pile_is_read_in_its_own_order(dataset):
    assert texts(dataset("pile"), "calibration") == [text for text, _ in PILE[:20]]
    assert texts(dataset("pile"), "evaluation") == [text for text, _ in PILE[20:]]


def test_kinds_of_text_are_chosen_and_left_out(dataset):
    for split, part in {"calibration": PILE[:20], "evaluation": PILE[20:]}.items():
        assert texts(dataset("code"), split) == [text for text, kind in part if kind == "Github"]
        assert texts(dataset("pile_no_code"), split) == [text for text, kind in part if kind != "Github"]
        both = dataset("pile", "group=meta.pile_set_name", "only=[Github,ArXiv]", "without=[ArXiv]")
        assert texts(both, split) == [text for text, kind in part if kind == "Github"]


def test_a_choice_of_kinds_needs_to_know_the_column(dataset):
    with pytest.raises(UserError, match=r"dataset\.group"):
        dataset("pile", "only=[Github]").check("text")


def test_articles_of_wikitext_are_whole(dataset):
    found = texts(dataset("wikitext"), "evaluation")
    assert len(found) == len(ARTICLES["test"])  # the empty line before the first heading is no document
    for i, n in enumerate(ARTICLES["test"]):
        (article,) = [text for text in found if text.strip().startswith(f"= test {i} =")]
        assert article.count("Line") == n and article.rstrip().endswith("= = Section = =")


def test_another_configuration_is_another_text(dataset):
    assert texts(dataset("wikitext", "config=wikitext-103-raw-v1"), "evaluation") == ["not this one\n"]


def test_what_is_not_streamed_comes_in_the_order_of_a_hash(dataset):
    for name in ("wikitext", "cifar10"):
        names = [example.name for example in dataset(name).examples("evaluation")]
        assert names == sorted(names, key=unit_hash) != sorted(names)


@pytest.mark.parametrize(("name", "n_classes"), [("imagenet_1k", 1000), ("cifar10", 10), ("cifar100", 100)])
def test_images_keep_their_labels_and_pixels(dataset, name, n_classes):
    images = dataset(name)
    assert images.class_names() == [f"class {i}" for i in range(n_classes)]
    found = {picture.name: picture for picture in images.examples("evaluation")}
    assert len(found) == N_IMAGES["test"]
    for name, picture in found.items():
        number = int(name.split("/")[1])
        assert picture.label == 7 * number % n_classes
        assert picture.read().getpixel((3, 3)) == (10 * number, number, 200)


BIRDS = {*range(7, 25), *range(80, 101), *range(127, 147)}


@pytest.mark.parametrize(
    ("classes", "labels"),
    [("birds", BIRDS), ("not_birds", set(range(1000)) - BIRDS), ("7", {7}), ("'0-9,21'", {*range(10), 21})],
)
def test_classes_are_chosen_by_name_or_number(dataset, classes, labels):
    streaming = "false" if classes == "birds" else "true"
    every = [picture.label for picture in dataset("imagenet_1k").examples("evaluation")]
    some = dataset("imagenet_1k", f"classes={classes}", f"streaming={streaming}")
    assert sorted(p.label for p in some.examples("evaluation")) == sorted(label for label in every if label in labels)
    assert len(some.class_names()) == 1000


def test_there_are_59_kinds_of_birds_in_imagenet(dataset, assets):
    lines = (assets / "deit_tiny_imagenet1k" / "imagenet_synset_words.txt").read_text().splitlines()
    birds = dataset("imagenet_1k", "classes=birds").labels()
    assert birds == BIRDS and len(birds) == 59
    # The ends of the three ranges, inside and outside, by name.
    inside = {7: "cock", 24: "great grey owl", 80: "black grouse", 100: "black swan", 127: "white stork",
              146: "albatross"}  # fmt: skip
    outside = {6: "stingray", 25: "European fire salamander", 79: "centipede", 101: "tusker", 126: "isopod",
               147: "grey whale"}  # fmt: skip
    for number, name in (inside | outside).items():
        assert name in lines[number] and (number in birds) == (number in inside)


def test_classes_that_do_not_exist_are_refused(dataset):
    with pytest.raises(UserError, match=r"dataset\.classes=fish: must be birds, not_birds"):
        dataset("imagenet_1k", "classes=fish").check("image")
    for classes, said in {"0-2,1000": "there is no class 1000; give numbers from 0 to 999", "998-1001": "no class 1001",
                          "7,5-3": "5-3 is empty, .* give 3-5"}.items():  # fmt: skip
        with pytest.raises(UserError, match=rf"^dataset\.classes={classes}: .*{said}") as error:
            dataset("imagenet_1k", f"classes='{classes}'").check("image")
        assert "\n" not in str(error.value)


def test_one_split_is_divided_by_a_hash(dataset):
    whole = dataset("pile", "calibration_split=train", "evaluation_split=train", "calibration_share=0.3")
    calibration, evaluation = (texts(whole, split) for split in ("calibration", "evaluation"))
    assert sorted(calibration + evaluation) == sorted(text for text, _ in PILE[:20])
    assert 0 < len(calibration) < len(evaluation)


# Saved to disk


def test_what_save_to_disk_wrote_is_read(dataset, tmp_path):
    import datasets

    parts = {split: datasets.Dataset.from_dict({"code": [f"{split} {i}" for i in range(5)]}) for split in ("a", "b")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    both = dataset("hub_text", "column=code", "calibration_split=a", "evaluation_split=b", path=tmp_path / "both")
    assert texts(both, "calibration") == [f"a {i}" for i in range(5)]
    assert texts(both, "evaluation") == [f"b {i}" for i in range(5)]
    with pytest.raises(UserError, match=r"the split train is not among a, b.*calibration_split"):
        texts(dataset("hub_text", "column=code", path=tmp_path / "both"), "calibration")

    parts["a"].save_to_disk(tmp_path / "one")
    one = dataset("hub_text", "column=code", "evaluation_split=train", "calibration_share=0.5", path=tmp_path / "one")
    halves = texts(one, "calibration"), texts(one, "evaluation")
    assert all(halves) and sorted(halves[0] + halves[1]) == [f"a {i}" for i in range(5)]


# What was read is kept


def test_rows_that_were_read_need_their_source_no_more(dataset, monkeypatch):
    first = []
    for document in dataset("pile").examples("calibration"):
        first.append(document.text)
        if len(first) == 7:
            break

    def unreachable(*arguments):
        raise ConnectionError("no network")

    monkeypatch.setattr(hub_rows, "_load", unreachable)
    again = []
    reader = dataset("pile").examples("calibration")
    for _ in range(7):
        again.append(next(reader).text)
    assert again == first == [text for text, _ in PILE[:7]]
    with pytest.raises(UserError, match=r"dataset\.path=.*cannot be loaded: no network"):
        next(reader)


def test_reading_on_after_a_stop_leaves_out_nothing_and_repeats_nothing(tmp_path):
    started = []

    def stream(start: int):
        started.append(start)
        yield from ((i, {"text": str(i)}) for i in range(start, 40) if i % 3)

    def some(n: int) -> list[int]:
        reader = hub_rows.cached_rows(tmp_path, stream)
        found = [number for number, _ in itertools.islice(reader, n)]
        reader.close()
        return found

    every = [i for i in range(40) if i % 3]
    assert some(5) == every[:5]
    assert some(3) == every[:3]
    assert some(12) == every[:12]
    assert [n for n, _ in hub_rows.cached_rows(tmp_path, stream)] == every
    before = len(started)
    assert [n for n, _ in hub_rows.cached_rows(tmp_path, stream)] == every
    assert len(started) == before, "the end of the stream was known, and yet it was opened"


def test_what_was_read_before_the_network_failed_is_kept(tmp_path):
    def breaks(start: int):
        for i in range(start, 9):
            if i == 4:
                raise ConnectionError
            yield i, {"text": str(i)}

    with pytest.raises(ConnectionError):
        list(hub_rows.cached_rows(tmp_path, breaks))
    found = hub_rows.cached_rows(tmp_path, lambda start: iter([(start, {"text": "later"})]))
    assert [(number, row["text"]) for number, row in found] == [(i, str(i)) for i in range(4)] + [(4, "later")]


def test_two_readers_at_once_do_not_disturb_each_other(tmp_path):
    def stream(start: int):
        yield from ((i, {"text": str(i)}) for i in range(start, 30))

    one, two = hub_rows.cached_rows(tmp_path, stream), hub_rows.cached_rows(tmp_path, stream)
    found = [[next(one)[0] for _ in range(5)], [next(two)[0] for _ in range(9)]]
    one.close()
    found[1] += [n for n, _ in two]
    assert found == [list(range(5)), list(range(30))]
    assert [n for n, _ in hub_rows.cached_rows(tmp_path, stream)] == list(range(30))


def flipped(content: bytes) -> bytes:
    """With a letter of a text changed, which no reader of parquet notices."""
    return content.replace(b"row", b"sow", 1)


DAMAGE = {
    "truncated": lambda whole, other: whole[: len(whole) // 2],
    "emptied": lambda whole, other: b"",
    "flipped": lambda whole, other: flipped(whole),
    "of another stream": lambda whole, other: other,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("part", ["000000004-000000008", "000000008-end"])
def test_a_damaged_file_of_rows_is_read_again_from_the_source(tmp_path, monkeypatch, caplog, part, damage):
    monkeypatch.setattr(hub_rows, "PART_ROWS", 4)
    stream = lambda start: ((i, {"text": f"row {i}"}) for i in range(start, 10))  # noqa: E731
    right = list(hub_rows.cached_rows(tmp_path / "one", stream))
    list(hub_rows.cached_rows(tmp_path / "other", lambda start: ((i, {"text": f"new {i}"}) for i in range(start, 10))))
    (file,), (other,) = ((list((tmp_path / kept).glob(f"{part}-*"))) for kept in ("one", "other"))
    whole = file.read_bytes()
    file.write_bytes(DAMAGE[damage](whole, other.read_bytes()))
    assert file.read_bytes() != whole
    assert list(hub_rows.cached_rows(tmp_path / "one", stream)) == right
    assert f"{file.name} is damaged" in caplog.text
    caplog.clear()
    assert list(hub_rows.cached_rows(tmp_path / "one", stream)) == right and not caplog.text


# Signatures


def test_a_fingerprint_depends_on_what_is_read_alone(dataset, tmp_path, copy_of):
    base = dataset("pile").fingerprint()
    moved = tmp_path / "elsewhere"
    shutil.copytree(copy_of("pile"), moved)
    assert dataset("pile", "label=other", path=moved).fingerprint() == base
    for change in ("only=[Github]", "column=other", "evaluation_split=train", "streaming=false", "data_files=null"):
        assert dataset("pile", change).fingerprint() != base, change
    (moved / ".cache").mkdir()
    for name in (".cache/hub.metadata", "multirun.yaml"):
        (moved / name).write_text("no rows")
    assert dataset("pile", path=moved).fingerprint() == base
    (moved / "test.jsonl.zst").write_bytes((moved / "train" / "00.jsonl.zst").read_bytes())
    assert dataset("pile", path=moved).fingerprint() != base  # also in the process that has seen it as it was


def test_the_commit_is_part_of_the_signature(job_of):
    def fingerprint(*overrides: str) -> str:
        return job_of("dataset=pile", *overrides).dataset.fingerprint()

    assert fingerprint() == fingerprint() != fingerprint(f"dataset.revision={'0' * 40}")


# What cannot be had


@pytest.mark.parametrize("name", ["pile", "imagenet_1k"])
def test_offline_and_missing_says_which_and_how(job_of, name):
    found = job_of(f"dataset={name}").dataset
    with pytest.raises(UserError, match=r"dataset\.name=\S+: cannot be loaded: .*prefetch=true") as error:
        next(iter(found.examples("evaluation")))
    assert "\n" not in str(error.value)


def test_a_column_that_is_not_there_is_named(dataset):
    for streaming in ("true", "false"):
        with pytest.raises(UserError, match="prose"):
            texts(dataset("tiny_stories", "column=prose", f"streaming={streaming}"), "evaluation")


# What a review found


def test_a_dataset_that_was_saved_without_splits_is_divided_whatever_they_are_called(dataset, tmp_path):
    import datasets

    every = [f"text {i}" for i in range(20)]
    datasets.Dataset.from_dict({"text": every}).save_to_disk(tmp_path / "one")
    one = dataset("hub_text", path=tmp_path / "one")
    assert one.calibration_split != one.evaluation_split
    calibration, evaluation = texts(one, "calibration"), texts(one, "evaluation")
    assert not set(calibration) & set(evaluation) and sorted(calibration + evaluation) == sorted(every)
    names = [d.name for split in ("calibration", "evaluation") for d in one.examples(split)]
    assert len(set(names)) == 20


def test_another_revision_in_the_cache_is_not_taken_for_the_pinned_one(job_of, monkeypatch, tmp_path):
    """Offline, `datasets` would give what it loaded last."""

    class Cached:
        cache_files = ({"filename": str(tmp_path / "default" / "0.0.0" / ("c" * 40) / "set-test.arrow")},)

    monkeypatch.setattr(hub_rows, "_load", lambda *arguments: Cached())
    right, wrong = (job_of("dataset=wikitext", f"dataset.revision={letter * 40}").dataset for letter in "cd")
    assert isinstance(right.load("test"), Cached)
    with pytest.raises(UserError, match=r"revision d{40} is not on this machine; .*prefetch=true"):
        wrong.load("test")


@pytest.mark.parametrize("content", ["", "[]", '["dog", "cat"]', None])
def test_damaged_class_names_are_read_again(dataset, monkeypatch, content):
    """In another order, say, they would make every score wrong."""
    images = dataset("imagenet_1k")
    names = images.class_names()
    (file,) = Path(datasets.config.HF_DATASETS_CACHE).rglob("classes.json")
    file.write_text(file.read_text().replace(f'"{names[0]}"', '"?"', 1) if content is None else content)
    assert images.class_names() == names


def test_a_column_without_class_names_is_refused_at_once(dataset, tmp_path):
    folder = tmp_path / "plain"
    write_parquet(
        folder / "data" / "train-00000-of-00001.parquet", {"image": [{"bytes": b"", "path": None}], "label": [3]}
    )
    for streaming in ("true", "false"):
        options = ["evaluation_split=train", f"streaming={streaming}"]
        with pytest.raises(UserError, match=r"dataset\.label_column=label: has no class names"):
            dataset("hub_images", *options, path=folder).check("image")


def test_a_column_that_holds_no_text_is_refused(dataset, tmp_path):
    write_parquet(tmp_path / "chat" / "data" / "train-0.parquet", {"text": [["hello", "you"]] * 3})
    with pytest.raises(UserError, match=r"dataset\.column=text: holds lists, not text"):
        texts(dataset("hub_text", "evaluation_split=train", path=tmp_path / "chat"), "evaluation")


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_a_column_that_holds_no_images_is_refused_before_a_model_is_loaded(job_of, copy_of, streaming):
    options = (f"path={copy_of('cifar10')}", f"streaming={streaming}", "image_column=label")
    job = job_of("model=tiny_vit", "dataset=cifar10", *(f"dataset.{option}" for option in options))
    with pytest.raises(UserError, match=r"dataset\.image_column=label: holds ints, not images"):
        job.check()


def test_files_are_named_for_images_as_for_text(dataset):
    files = "data_files={train: data/train-*.parquet, test: data/test-*.parquet}"
    names = [[picture.name for picture in images.examples("evaluation")]
             for images in (dataset("cifar10"), dataset("cifar10", files))]  # fmt: skip
    assert names[0] == names[1] and len(names[0]) == N_IMAGES["test"]


@pytest.mark.parametrize("reachable", [True, False])
def test_a_branch_stands_for_the_commit_that_was_fetched(monkeypatch, tmp_path, reachable):
    """It is asked for once; without a network, what is known counts, as offline."""
    import types

    import httpx
    import huggingface_hub
    from huggingface_hub import constants

    from ablation_sweeps.base.hub import commit

    class Api:
        def repo_info(self, repo, **options):
            if not reachable:
                raise httpx.ConnectError("Connection refused")
            return types.SimpleNamespace(sha="e" * 40)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    commit.cache_clear()
    assert commit("me/stories", None, "dataset") == ("e" * 40 if reachable else "main")
    assert reachable != constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit.cache_clear()
    assert commit("me/stories", None, "dataset") == ("e" * 40 if reachable else "main")
    assert commit("me/stories", "b" * 40, "dataset") == "b" * 40
    commit.cache_clear()
