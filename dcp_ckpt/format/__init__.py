"""The format: pure functions and documents, the code of docs/format.md. No storage, no torch."""
