"""How bytes move: adapters of `core.ports.Transfer`. Imports `core` and no other room.

presigned.py   the adapter: files by requests that a server signed for us
  batch.py       one call's window of files: signers, stories, progress, the first failure, the end
    story.py       a story as a generator, and what it may wait for
  download.py    the story of one input, top to bottom            part.py     its growing file, resumable
    ranges.py      how many connections bring it, and which part    cache.py    inputs of earlier jobs
  upload.py      the story of one output, top to bottom           body.py     what is sent, raw or as a form
  digests.py     what a whole file must hash to                   hashing.py  the hashing of large ones, beside it all
  patience.py    when to try again, and when to give up           replies.py  what a store's answer means
  wire.py        one signed request over the loop: redirects by hand, addresses checked
    guard.py       which addresses may be connected to
    exchange.py    one HTTP request, and the warm libcurl handle that performs it
    multi.py       the one thread in which all of them run          limits.py   connections and bytes, bounded

Three kinds of threads: the loop's, in which all stories are told and all bytes pass; a few that wait (signers, calls
aside) and a few that hash; and the caller's, which is told what happened. A story is a straight line that yields what
it waits for, so a file costs no thread and no hand-over between threads.
"""
