"""The small sets that ship with the package; README.md is their data card."""
