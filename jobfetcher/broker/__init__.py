"""A broker for the engine's socket: what the worker may ask of an engine, and nothing else (FAULTS.md T33).

Made by `build_broker` for the command `jobfetcher broker`. The worker speaks to the network; whoever breaks into it
would have the engine's socket, which is as good as root. With a broker the worker has none: it asks the broker, over a
unix socket of the broker's own (DOCKER_HOST), in the engine's own words, and the broker asks the engine.

`rules` is the table of what may be asked; `boxes` makes containers anew from what a job may choose; `pins` has their
mounts lead where they say; `answers` takes out what is not the worker's business; `ledger` remembers; `talk` reads and
writes HTTP strictly; `server` has the sockets. The policy is the machine owner's settings, never the worker's word.
"""
