"""What a network looked at (class activation maps) and what it learned to look back at (its shortcut weights)."""
