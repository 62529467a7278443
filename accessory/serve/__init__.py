"""The front doors that people and programs talk through.

Must not hold tensors: what is asked goes to an engine, and text comes back.
"""
