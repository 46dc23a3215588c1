"""Models trained at several sites whose sequences stay where they are."""
