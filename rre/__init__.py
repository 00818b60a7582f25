"""Random Routed Experts: tables, routers, dispatch, experts and their store."""
