import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from finetune.data import decoded, images
from finetune.data.decoded import DecodedCache
from finetune.data.loaders import Batch, chop, epoch_order, make_loader, text_lengths, token_batches
from finetune.data.sources import load_images, load_table
from finetune.errors import DataError
from finetune.model.pretrained import Preprocessing

PRE = Preprocessing(size=(16, 20), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bilinear")
Make = Callable[..., Path]
LENGTHS = np.random.default_rng(0).geometric(0.05, 1003).tolist()


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("epoch", [None, 0, 3])
def test_an_epoch_has_every_row_once_and_its_short_batch_last(lengths: list[int] | None, epoch: int | None):
    batches = epoch_order(1003, 8, seed=5, epoch=epoch, lengths=lengths)
    assert sorted(itertools.chain(*batches)) == list(range(1003))
    assert [len(batch) for batch in batches] == [8] * 125 + [3]


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_order_is_a_pure_function(lengths: list[int] | None):
    def order(seed: int, epoch: int) -> list[list[int]]:
        return epoch_order(1003, 8, seed=seed, epoch=epoch, lengths=lengths)

    np.random.seed(0)
    first = order(1, 2)
    np.random.rand()
    torch.rand(1)
    assert first == order(1, 2)
    assert first != order(1, 3) and first != order(2, 2) and order(2, 1) != first


def test_evaluation_order():
    assert epoch_order(5, 2, seed=0, epoch=None) == [[0, 1], [2, 3], [4]]
    assert epoch_order(5, 2, seed=9, epoch=None, lengths=[3, 1, 2, 1, 9]) == [[1, 3], [2, 0], [4]]
    assert epoch_order(0, 2, seed=0, epoch=1) == [] and epoch_order(3, 8, seed=0, epoch=None) == [[0, 1, 2]]


def test_like_lengths_together_save_padding():
    def padding(batches: list[list[int]]) -> int:
        return sum(max(LENGTHS[i] for i in batch) * len(batch) - sum(LENGTHS[i] for i in batch) for batch in batches)

    mixed = padding(epoch_order(1003, 8, seed=0, epoch=0))
    alike = epoch_order(1003, 8, seed=0, epoch=0, lengths=LENGTHS)
    assert padding(alike) < 0.2 * mixed
    means = [np.mean([LENGTHS[i] for i in batch]) for batch in alike]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2  # long batches are not all at one end


def test_a_short_batch_is_of_any_length():
    short = [epoch_order(100, 16, seed=0, epoch=epoch, lengths=LENGTHS[:100])[-1] for epoch in range(60)]
    assert {len(rows) for rows in short} == {4}
    assert len(set(itertools.chain(*short))) > 70
    by_length = np.argsort(LENGTHS[:100])
    for end in (by_length[:20], by_length[-20:]):
        assert 3 < sum(bool(set(rows) & set(end.tolist())) for rows in short) < 40


@pytest.mark.parametrize(("most_tokens", "most_rows"), [(64, 8), (1000, 10), (10**9, 10**9), (1, 5), (40, 1)])
def test_batches_by_tokens(most_tokens: int, most_rows: int):
    batches = token_batches(LENGTHS, most_tokens, most_rows)
    rows = list(itertools.chain(*batches))
    assert sorted(rows) == list(range(1003))
    assert [LENGTHS[row] for row in rows] == sorted(LENGTHS)
    cost = [len(batch) * max(LENGTHS[row] for row in batch) for batch in batches]
    assert all(len(batch) == 1 or tokens <= most_tokens for batch, tokens in zip(batches, cost, strict=True))
    assert max(map(len, batches)) <= most_rows
    for batch, after in itertools.pairwise(batches):  # none could have had one row more
        assert len(batch) == most_rows or (len(batch) + 1) * LENGTHS[after[0]] > most_tokens


def test_batches_by_tokens_of_nothing_and_of_one():
    assert token_batches([], 10, 10) == [] and token_batches([30], 10, 10) == [[0]]
    assert token_batches([5, 1, 5, 1], 10, 10) == [[1, 3], [0, 2]]


def batches_of(loader: object) -> list[Batch]:
    return list(loader)  # type: ignore[call-overload]


def test_images_for_evaluation(folder: Make):
    splits = load_images(folder(cat=6, dog=6))
    order = epoch_order(len(splits.train), 4, seed=0, epoch=None)
    found = batches_of(make_loader(splits.train, splits.task, PRE, order, train=False, workers=0))
    assert [batch.index.tolist() for batch in found] == order and len(found[0]) == 4
    assert found[0].inputs["pixel_values"].shape == (4, 3, 16, 20)
    assert found[0].inputs["pixel_values"].dtype == torch.float32
    assert torch.cat([batch.targets for batch in found]).tolist() == splits.train["target"][:]
    loader = make_loader(splits.train, splits.task, PRE, order, train=False, workers=0, image_size=24)
    assert batches_of(loader)[0].inputs["pixel_values"].shape == (4, 3, 24, 24)


def test_images_from_bytes_are_those_from_files(folder: Make):
    splits = load_images(folder(cat=6, dog=6))
    cells = [{"path": None, "bytes": Path(cell["path"]).read_bytes()} for cell in splits.train["image"]]
    data = splits.train.remove_columns("image").add_column("image", cells, feature=datasets.Image(decode=False))
    order = [[1, 5], [0]]
    files, from_bytes = (
        batches_of(make_loader(source, splits.task, PRE, order, train=True, workers=0))
        for source in (splits.train, data)
    )
    for a, b in zip(files, from_bytes, strict=True):
        assert torch.equal(a.inputs["pixel_values"], b.inputs["pixel_values"])


def test_augmentation_depends_on_seed_epoch_and_row_alone(folder: Make):
    splits = load_images(folder(cat=6, dog=6))

    def images(order: list[list[int]], workers: int = 0, **options: int) -> dict[int, torch.Tensor]:
        torch.manual_seed(len(order))  # must not matter
        loader = make_loader(splits.train, splits.task, PRE, order, train=True, workers=workers, **options)
        return {
            int(row): image
            for batch in batches_of(loader)
            for row, image in zip(batch.index, batch.inputs["pixel_values"], strict=True)
        }

    first = images([[0, 1, 2], [3, 4, 5]], seed=1, epoch=2)
    for other in (
        images([[5, 3], [1], [0, 4, 2]], seed=1, epoch=2),
        images([[4, 5], [0, 1, 2, 3]], 2, seed=1, epoch=2),
    ):
        assert all(torch.equal(first[row], other[row]) for row in first)
    for changed in (images([[0, 1, 2]], seed=1, epoch=3), images([[0, 1, 2]], seed=2, epoch=2)):
        assert not any(torch.equal(first[row], changed[row]) for row in changed)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("share", [0.2, 0.0])
def test_a_cache_for_all_epochs_with_and_without_workers(
    folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, train: bool
):
    monkeypatch.setattr(decoded, "MEMORY_SHARE", share)  # in a file where it is 0
    splits = load_images(folder(cat=6, dog=6))
    order = [[5, 3], [1], [0, 4, 2]]

    def found(workers: int, epoch: int, cache: DecodedCache | None) -> torch.Tensor:
        loader = make_loader(
            splits.train, splits.task, PRE, order, train=train, workers=workers, epoch=epoch, cache=cache
        )
        return torch.cat([batch.inputs["pixel_values"] for batch in batches_of(loader)])

    plain = [found(0, epoch, None) for epoch in (0, 1)]
    for first, second in ((0, 2), (2, 0)):
        cache = DecodedCache(tmp_path / "cache", 2**24)
        assert torch.equal(found(first, 0, cache), plain[0])
        with monkeypatch.context() as patch:
            patch.setattr(images, "open_image", None)  # all there, whichever process put it in
            assert torch.equal(found(second, 1, cache), plain[1])
        cache.close()


def test_loading_leaves_the_random_numbers_of_training_alone(folder: Make):
    splits = load_images(folder(cat=6, dog=6))
    drawn = []
    for order in ([[0]], [[0, 1, 2, 3], [4, 5]]):
        torch.manual_seed(7)
        next(iter(make_loader(splits.train, splits.task, PRE, order, train=True, workers=0)))
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch, of the process that died
def test_a_loading_process_that_dies_costs_nothing(folder: Make, capfd: pytest.CaptureFixture[str]):
    splits = load_images(folder(cat=16, dog=16))
    order = chop(np.arange(len(splits.train)), 2)
    plain = batches_of(make_loader(splits.train, splits.task, PRE, order, train=True, workers=0))
    found = []
    for batch in make_loader(splits.train, splits.task, PRE, order, train=True, workers=1):
        if len(found) == 1:
            (worker,) = psutil.Process().children()
            worker.kill()
        found.append(batch)
    assert [batch.index.tolist() for batch in found] == order
    for one, other in zip(found, plain, strict=True):
        assert torch.equal(one.inputs["pixel_values"], other.inputs["pixel_values"])
    assert "loading goes on in the main process" in capfd.readouterr().err


def test_the_signal_of_a_death_may_come_after_its_closed_pipe(folder: Make, monkeypatch: pytest.MonkeyPatch):
    splits = load_images(folder(cat=4, dog=4))
    made = make_loader(splits.train, splits.task, PRE, [[0, 1], [2, 3]], train=False, workers=1)
    plain, calls = made.loader, []

    def loader(rows: list[list[int]]) -> Any:
        calls.append(made.workers)
        if len(calls) == 1:
            return iter(dying())
        if len(calls) == 2:
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
        return plain(rows)

    def dying() -> Iterator[Any]:
        raise ConnectionResetError
        yield

    monkeypatch.setattr(made, "loader", loader)
    assert [batch.index.tolist() for batch in made] == [[0, 1], [2, 3]] and calls == [1, 0, 0]


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_that_have_become_unreadable(folder: Make, workers: int):
    splits = load_images(folder(cat=6, dog=6))
    lost = Path(splits.train["image"][3]["path"])
    content = lost.read_bytes()
    for damage, why in ((b"", "empty file"), (content[:-40], "truncated or damaged image"), (None, "file not found")):
        lost.unlink() if damage is None else lost.write_bytes(damage)
        first, second = batches_of(
            make_loader(splits.train, splits.task, PRE, [[2, 3, 4], [5]], train=True, workers=workers)
        )
        assert first.index.tolist() == [2, 4] and len(first.inputs["pixel_values"]) == 2
        assert first.targets is not None and first.targets.tolist() == splits.train[[2, 4]]["target"]
        assert (first.unreadable, second.unreadable) == ({3: why}, {})
        for order, train in (([[2, 3, 4]], False), ([[3]], True)):
            with pytest.raises(DataError) as caught:
                batches_of(make_loader(splits.train, splits.task, PRE, order, train=train, workers=workers))
            assert str(caught.value).startswith(f"{splits.train['id'][3]}: {why}; it could be read when the run began.")


def test_without_augmentation(folder: Make):
    splits = load_images(folder(cat=6, dog=6))
    plain, train = (
        batches_of(make_loader(splits.train, splits.task, PRE, [[0]], train=train, augment="none", workers=0))[0]
        for train in (False, True)
    )
    assert torch.equal(plain.inputs["pixel_values"], train.inputs["pixel_values"])
    with pytest.raises(ValueError, match="^augment: 'strong'; give 'default' or 'none'$"):
        make_loader(splits.train, splits.task, PRE, [[0]], train=True, augment="strong")


def test_texts(table: Make, tokenizer: PreTrainedTokenizerFast):
    rows = [f"{'cat ' * (i % 7 + 1)}{i},{i % 2}" for i in range(40)]
    splits = load_table(table("\n".join(["text,label", *rows])))
    lengths = text_lengths(splits.train, splits.task, tokenizer)
    order = epoch_order(len(splits.train), 8, seed=0, epoch=0, lengths=lengths)
    found = batches_of(make_loader(splits.train, splits.task, tokenizer, order, train=True))
    assert all(batch.inputs["input_ids"].shape[1] == max(lengths[row] for row in batch.index) for batch in found)
    targets = splits.train["target"][:]
    assert all(batch.targets.tolist() == [targets[row] for row in batch.index] for batch in found)
    assert found[0].targets.dtype == torch.int64


def test_targets_of_other_tasks(table: Make, tokenizer: PreTrainedTokenizerFast):
    rows = [f"cat {i},{i % 2},{int(i % 3 == 0)},{i}.5" for i in range(40)]
    path = table("\n".join(["text,red,big,score", *rows]))
    for columns in (["red", "big"], "score"):
        splits = load_table(path, label=columns)
        batch = batches_of(make_loader(splits.train, splits.task, tokenizer, [[0, 1, 2]], train=False))[0]
        assert batch.targets.shape == (3, splits.task.outputs) and batch.targets.dtype == torch.float32
    tagged = datasets.Dataset.from_dict({"tokens": [["cat", str(i)] for i in range(20)], "tags": [["O", "X"]] * 20})
    splits = load_table(tagged)
    batch = batches_of(make_loader(splits.train, splits.task, tokenizer, [[0, 1]], train=False))[0]
    assert batch.targets.tolist() == [[-100, 0, 1, -100]] * 2 and "targets" not in batch.inputs


def test_batch_without_targets_moves(tokenizer: PreTrainedTokenizerFast, table: Make):
    splits = load_table(table("\n".join(["text,label", *(f"cat {i},{i % 2}" for i in range(20))])))
    data = splits.train.remove_columns("target")
    batch = batches_of(make_loader(data, splits.task, tokenizer, [[0, 1]], train=False))[0]
    assert batch.targets is None
    moved = batch.to("meta")
    assert moved.targets is None and moved.inputs["input_ids"].device.type == "meta"
    assert moved.index is batch.index


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_are_pinned(folder: Make):
    splits = load_images(folder(cat=6, dog=6))
    batch = batches_of(make_loader(splits.train, splits.task, PRE, [[0, 1]], train=True, workers=1))[0]
    assert batch.inputs["pixel_values"].is_pinned() and batch.to("cuda").targets.device.type == "cuda"
