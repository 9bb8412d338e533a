"""What runs containers: the Docker engine on this machine, behind the seam `core.ports.Engine`.

`run_spec` and `box` are pure (what a job gets); `images` brings images; `docker` is the engine; `host_path` finds where
the data directory lies for the engine; `api` is the one door to it. `build.py` is the only room that imports this one.
"""
