"""Whether plugins are, return and leave alone what their contracts say."""
