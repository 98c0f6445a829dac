public enum Datapath_ {}
