"""How models write calls of tools and thoughts: read from what they say, demanded by grammars, shown in prompts."""
