"""The methods: what is trained, and how it is prepared. Each is a package of its own."""
