import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from specialize.engine.pages import PageAllocator, page_key


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.data())
def test_books_balance_after_every_operation(num_pages, data):
    allocator = PageAllocator(num_pages, 4)
    sequences: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 40))):
        operation = data.draw(st.sampled_from(["allocate", "release", "publish", "acquire", "forget"]))
        if operation == "allocate":
            count = data.draw(st.integers(0, num_pages + 1))
            available = allocator.num_available
            pages = allocator.allocate(count)
            assert (pages is None) == (count > available)
            if pages:
                sequences.append(pages)
        elif operation == "release" and sequences:
            allocator.release(sequences.pop(data.draw(st.integers(0, len(sequences) - 1))))
        elif operation == "publish" and sequences:
            pages = data.draw(st.sampled_from(sequences))
            allocator.publish(data.draw(st.sampled_from(pages)), bytes([data.draw(st.integers(0, 5))]))
        elif operation == "acquire":
            keys = [bytes([k]) for k in data.draw(st.lists(st.integers(0, 5), max_size=3, unique=True))]
            pages = allocator.acquire(keys)
            if pages:
                sequences.append(pages)
        elif operation == "forget" and data.draw(st.integers(0, 9)) == 0:
            allocator.forget_contents()
        allocator.check()
        held = {page for pages in sequences for page in pages}
        assert allocator.num_held == len(held)
        assert allocator.num_available + allocator.num_held == num_pages
    for pages in sequences:
        allocator.release(pages)
    allocator.check()
    assert allocator.num_available == num_pages


def test_idle_pages_are_found_until_the_oldest_is_given_away():
    allocator = PageAllocator(3, 4)
    pages = allocator.allocate(2)
    assert pages is not None
    first, second = pages
    allocator.publish(first, b"a")
    allocator.publish(second, b"b")
    allocator.release([first, second])
    assert allocator.num_available == 3
    assert allocator.acquire([b"a", b"b"]) == [first, second]
    allocator.release([first, second])
    assert allocator.allocate(2) is not None  # the free page, then the tail of the idle prefix
    assert allocator.acquire([b"a", b"b"]) == [first]


def test_a_shared_page_is_kept_while_anyone_holds_it():
    allocator = PageAllocator(1, 4)
    [page] = allocator.allocate(1) or []
    allocator.publish(page, b"a")
    assert allocator.acquire([b"a"]) == [page]
    allocator.release([page])
    assert allocator.allocate(1) is None
    allocator.release([page])
    assert allocator.allocate(1) == [page]
    assert allocator.acquire([b"a"]) == []


def test_releasing_twice_is_an_error():
    allocator = PageAllocator(1, 4)
    pages = allocator.allocate(1) or []
    allocator.release(pages)
    with pytest.raises(RuntimeError, match="nobody holds"):
        allocator.release(pages)


def test_keys_depend_on_all_tokens_before():
    assert page_key(page_key(b"", b"one"), b"two") != page_key(page_key(b"", b"eno"), b"two")
    assert page_key(b"salt", b"one") != page_key(b"", b"one")


def test_pages_and_scheduler_import_no_torch():
    code = "import sys, specialize.engine.pages, specialize.engine.scheduler; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
