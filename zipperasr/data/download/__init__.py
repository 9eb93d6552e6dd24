"""Stage 0: files fetched, verified and unpacked, so that a part of a corpus is either there whole or not at all.

fetch: one file over HTTP. archives: verified, unpacked. parts: of a corpus, in parallel. clients, hub: hosts with a
client of their own. The corpora themselves are a table in local/corpora.py.
"""
