"""Images, from a user's folder to normalised batches on a device; knows nothing of the method.

In the order of the data: `sources` and `folders` (which images there are), `decoding`, `pack` and `store` (one LMDB a
split), `data` (splits, prepared once) and `loading` (batches).
"""
