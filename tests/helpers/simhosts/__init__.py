"""Several hosts in one process, under a virtual clock: models around the real Job and the real decisions.

    real      Job, HostBook, Roster, Election, Council, assign, candidates; place, survivable; decide_resume; Kept;
              choose (which half a snapshot overwrites), choose_half (which one parity does)
    modelled  machines and network (network, machine), agents (session.py, supervisor.py), coordinators' streams and
              election (control.py), ranks (member.py, rejoin.py, engine.py, finish.py), snapshot managers, protectors

    Machine ── Agent ──┐ Pipe (in order, late; silent across a cut)     Coordinator ── Job
       └── Process ────┘

What must never happen is checked at every event (oracle). Not modelled: bytes, corruption, one-way cuts, the loss of
a snapshot manager or protector alone, clocks that differ, parity without the network, checkpoints on disk.
"""
