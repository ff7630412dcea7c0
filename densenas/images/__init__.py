"""Images, from a user's folder to normalised batches on a device; knows nothing of the method.

In the order of the data: `sources` and `folders` (which images there are, as `items`), `splits`, `decoding` and
`transforms`, `packing`, `pack` and `store` (one LMDB a split), `prepare` (a data set, once), `data` (as it then is),
`loading` (batches).
"""
