"""Rows that cross from device memory to device memory, while their headers take the links between hosts."""
