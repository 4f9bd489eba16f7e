"""The protector: keeps parity of every host's snapshots on other hosts, and brings back what was lost.

    rank ─▶ SMP (memory) ◀─ protector ◀── TCP ──▶ protectors of the other hosts
                               ▲ control (unix): topology, reserve, rebuild, keep, page, status

One process per host, no torch. `client` is what agents and ranks use; `service` is the process.
"""
