"""The commands of ``python -m jaxkit``, one module each."""
