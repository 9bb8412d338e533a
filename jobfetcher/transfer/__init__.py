"""How bytes move: adapters of `core.ports.Transfer`. Imports `core` and no other room.

presigned.py   the adapter: files by requests that a server signed for us
  batch.py       one call's window of files: workers, progress, the first failure, the end
  download.py    the story of one input, top to bottom            part.py     its growing file, resumable
  upload.py      the story of one output, top to bottom           body.py     what is sent, raw or as a form
  digests.py     what a whole file must hash to                   replies.py  what a store's answer means
  patience.py    when to try again, and when to give up
  wire.py        one signed request over the loop: redirects by hand, addresses checked
    guard.py       which addresses may be connected to
    exchange.py    one HTTP request on one libcurl handle
    multi.py       the one thread in which all of them run
"""
