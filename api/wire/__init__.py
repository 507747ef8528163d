"""Bytes of the SDK ↔ values of `jobs.operations`: protobuf and JSON, every version of the SDK that is served."""
