"""Commands about policies, plugins and plans."""
