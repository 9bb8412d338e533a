"""The demo: one real microscope image through one real worker; `make demo` runs it, README.md here explains it."""
