"""Converters from the shapes datasets come in to one `Conversation`; neither torch nor transformers
is imported here.
"""
