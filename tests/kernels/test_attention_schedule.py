"""The persistent schedule of Hopper's attention kernels: ``find_tile``'s arithmetic, written out, over whole grids."""

import pytest

hopper = pytest.importorskip("specialize.kernels.attention_hopper", reason="needs Triton's Gluon")


def tiles_by_program(num_tokens, num_sequences, num_heads, most_heads, processors, late_first):
    num_tiles = num_tokens // 128 + num_sequences
    programs = min(num_tiles * num_heads, processors)
    group_heads, num_slots = hopper.plan(num_tokens, num_sequences, num_heads, most_heads, programs, late_first)
    assert 1 <= group_heads <= most_heads
    slots_each = -(-num_tiles * group_heads // programs)
    mine = [[] for _ in range(programs)]
    for slot in range(num_slots):
        group = slot // slots_each
        heads_here = min(group_heads, num_heads - group * group_heads)
        for program in range(programs):
            lane = program if slot % 2 == 0 else programs - 1 - program
            inside = (slot - group * slots_each) * programs + lane
            if inside < num_tiles * heads_here:
                tile = inside // heads_here
                head = group * group_heads + inside % heads_here
                mine[program].append((num_tiles - 1 - tile if late_first else tile, head))
    return num_tiles, mine


@pytest.mark.parametrize("late_first", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "num_sequences", "num_heads", "most_heads"),
    [(1, 1, 1, 1), (37, 3, 9, 4), (1000, 7, 4, 4), (2048, 1, 32, 24), (5000, 3, 12, 5), (8192, 1, 32, 6)],
)
def test_every_tile_of_every_head_has_one_program(num_tokens, num_sequences, num_heads, most_heads, late_first):
    num_tiles, mine = tiles_by_program(num_tokens, num_sequences, num_heads, most_heads, 132, late_first)
    given = [item for items in mine for item in items]
    assert sorted(given) == [(tile, head) for tile in range(num_tiles) for head in range(num_heads)]


@pytest.mark.parametrize("late_first", [False, True])
@pytest.mark.parametrize(("num_heads", "most_heads"), [(32, 6), (64, 6), (8, 6), (32, 24)])
def test_no_program_has_much_more_to_do_than_another(num_heads, most_heads, late_first):
    _, mine = tiles_by_program(8192, 1, num_heads, most_heads, 132, late_first)
    work = [sum(tile + 1 if late_first else 64 - tile for tile, _ in items if tile < 64) for items in mine]
    assert max(work) <= 1.04 * sum(work) / len(work)
