"""`accessory api`: a server that speaks OpenAI's HTTP interface, with one model behind it.

Must not know how answers are made: requests go to a service, and what comes back is written as programs expect it.
"""
