"""Domains learned one after another, and what became of each measured after every stage."""
