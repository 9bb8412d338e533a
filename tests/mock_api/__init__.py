"""The mock API against PROTOCOL.md, over a real socket."""
