import numpy as np
import torch
from specialize.engine.batch import Batch, upload


def test_packed_positions_and_starts():
    batch = Batch.packed([[5, 6, 7], [], [9]])
    assert batch.token_ids.tolist() == [5, 6, 7, 9]
    assert batch.positions.tolist() == [0, 1, 2, 0]
    assert batch.query_starts.tolist() == [0, 3, 3, 4]
    assert batch.context_lens.tolist() == [3, 0, 1]
    assert (batch.max_query_len, batch.max_context_len, batch.num_decodes) == (3, 3, 0)
    assert batch.token_ids.dtype == torch.int64 and batch.query_starts.dtype == torch.int32
    assert (batch.num_tokens, batch.num_sequences) == (4, 3)


def test_packed_of_nothing():
    batch = Batch.packed([])
    assert batch.num_tokens == 0 and batch.query_starts.tolist() == [0]


def test_upload_keeps_dtype_shape_and_values():
    arrays = {
        "a": np.arange(3, dtype=np.int32),
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "c": np.array([2**40], np.int64),
        "d": np.array([True, False]),
        "e": np.empty((0, 4), np.int32),
    }
    tensors = upload(arrays, "cpu")
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors[name].numpy(), array)
        assert tensors[name].shape == array.shape
        assert tensors[name].data_ptr() % 16 == 0
    arrays["a"][:] = 0
    assert tensors["a"].tolist() == [0, 1, 2]
