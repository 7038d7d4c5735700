"""Adapters merged by arithmetic: hand-worked entries, and the written file against dense sums of updates."""

from __future__ import annotations

import pytest
import torch
from models import tiny_pair
from specialize.engine.adapter import load_adapter
from specialize.engine.adapter_format import save_part_matrices
from specialize.engine.model import Model
from specialize.train.merging import dare, merge_adapters, ties, trim

from specialize.errors import InputError


def test_ties_by_hand():
    one = torch.tensor([[4.0, -1.0, 3.0, 0.5]])
    two = torch.tensor([[-6.0, -2.0, 1.0, 0.1]])
    assert trim(one, 0.5).tolist() == [[4.0, 0.0, 3.0, 0.0]] and trim(two, 0.5).tolist() == [[-6.0, -2.0, 0.0, 0.0]]
    # 4 against −6: the sign is minus; −2 and 3 have no rival
    assert ties([one, two], 0.5).tolist() == [[-6.0, -2.0, 3.0, 0.0]]
    assert ties([one, two], 1.0).tolist() == [[-6.0, -1.5, 2.0, pytest.approx(0.3)]]
    assert ties([one, -one], 1.0).tolist() == [[0.0] * 4]


def test_dare_keeps_the_expectation():
    update = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    drawn = torch.stack([dare([update], 0.25, generator) for _ in range(400)])
    assert abs(float((drawn == 0).float().mean()) - 0.75) < 0.01
    kept = drawn != 0
    torch.testing.assert_close(drawn[kept], (update * 4).expand_as(drawn)[kept])
    assert (drawn.mean(0) - update).abs().max() < 5 * float(update.abs().max()) * (3 / 400) ** 0.5
    assert torch.equal(dare([update, update], 1.0, generator), 2 * update)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Our model, two adapter folders of it with other ranks, targets and scalings, and a third of another base."""
    folder = tmp_path_factory.mktemp("merging")
    _, model = tiny_pair("Llama", folder / "base")

    def save(name, seed, rank, alpha, targets, factor=1):
        generator = torch.Generator().manual_seed(seed)
        parts = {
            part.path: (
                torch.randn(rank, factor * a.linear.in_features, generator=generator),
                torch.randn(part.stop - part.start, rank, generator=generator),
            )
            for a in model.adaptable
            for part in a.parts
            if part.name in targets
        }
        return save_part_matrices(folder / name, parts, rank=rank, alpha=alpha, targets=targets)

    both = ("q_proj", "k_proj", "up_proj")
    return model, [save("a", 1, 4, 8, both), save("b", 2, 3, 3, (*both, "down_proj"))], save("c", 3, 2, 2, both, 2)


def updates(model: Model, folder) -> dict[str, torch.Tensor]:
    adapter = load_adapter(folder, model)
    return {path: adapter.scaling * b @ a for path, (a, b) in adapter.parts.items()}


@pytest.mark.parametrize("method", ["average", "ties", "dare"])
def test_the_file_holds_the_merge(made, method, tmp_path):
    model, folders, _ = made
    report = merge_adapters(folders, method, tmp_path / "m", density=0.6, weight=0.7, rank=80, seed=3)
    one, two = (updates(model, folder) for folder in folders)
    generator = torch.Generator().manual_seed(3)
    found = updates(model, tmp_path / "m")
    assert set(found) == set(one) | set(two)
    for path in sorted(found):
        both = [deltas[path] for deltas in (one, two) if path in deltas]
        wanted = {
            "average": lambda both=both: sum(both) / 2,
            "ties": lambda both=both: ties(both, 0.6),
            "dare": lambda both=both: dare(both, 0.6, generator) / 2,
        }[method]()
        torch.testing.assert_close(found[path], 0.7 * wanted, atol=2e-4, rtol=1e-3)
    assert report.lost < 1e-5 and report.rank == (7 if method == "average" else 80)


def test_a_lower_rank_says_what_it_loses(made, tmp_path):
    model, folders, _ = made
    report = merge_adapters(folders, "ties", tmp_path / "m", density=0.6, rank=8)
    one, two = (updates(model, folder) for folder in folders)
    found = updates(model, tmp_path / "m")
    lost = whole = 0.0
    for path in found:
        wanted = ties([deltas[path] for deltas in (one, two) if path in deltas], 0.6)
        lost += float((wanted - found[path]).square().sum())
        whole += float(wanted.square().sum())
        assert torch.linalg.matrix_rank(found[path]) == 8
    assert 0.1 < report.lost < 0.9 and report.lost == pytest.approx((lost / whole) ** 0.5, rel=1e-3)


def test_other_shapes_and_methods_are_refused(made, tmp_path):
    _, folders, foreign = made
    with pytest.raises(InputError, match="share one base"):
        merge_adapters([folders[0], foreign], "ties", tmp_path / "m")
    with pytest.raises(InputError, match="method: sum"):
        merge_adapters(folders, "sum", tmp_path / "m")
    with pytest.raises(InputError, match="density: 0"):
        merge_adapters(folders, "dare", tmp_path / "m", density=0.0)
