"""Object stores: S3 through s3fs, and other fsspec file systems through the same class.

The only package that imports fsspec, s3fs or botocore, and only when a store is opened. `ObjectStorage`
speaks the storage protocol; an `ObjectClient` speaks to one store, one request a method; `RetryingClient`
repeats requests. Called through `dcp_ckpt.storage.open_storage`.
"""
