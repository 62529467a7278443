"""`accessory webchat`: a page in a browser that talks with a model, for several people at once.

Must not hold tensors nor reach out of this host: what the page needs comes from this process.
"""
