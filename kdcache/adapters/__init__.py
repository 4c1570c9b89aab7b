"""Distillation from a cache in other training libraries. Each module needs the library that it is named after."""
