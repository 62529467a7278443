"""The toolkit from Python: a model that is loaded and asked, ms-swift's functions, and the verbs as functions.

Must not hold tensors or parse command lines; the names below are handed on at the top of the package.
"""
