"""Stub."""
def write_document(result, folder):
    pass
