"""Hugging Face folders: their names, configs and files, read and written. The rest of the house sees canonical names.

Must not know transformers: what a folder holds is read from its own files.
"""
