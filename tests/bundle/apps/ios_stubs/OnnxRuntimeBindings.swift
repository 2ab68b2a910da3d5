import Foundation

public enum ORTLoggingLevel { case verbose, info, warning, error, fatal }

public enum ORTTensorElementDataType { case undefined, float, int8, uInt8, int32, uInt32, int64, uInt64, string }

public class ORTEnv { public init(loggingLevel: ORTLoggingLevel) throws {} }

public class ORTSessionOptions {
    public init() throws {}
    public func setIntraOpNumThreads(_ intraOpNumThreads: Int32) throws {}
}

public class ORTRunOptions {}

public class ORTTensorTypeAndShapeInfo { public var shape: [NSNumber] = [] }

public class ORTValue {
    public init(tensorData: NSMutableData, elementType: ORTTensorElementDataType, shape: [NSNumber]) throws {}
    public func tensorTypeAndShapeInfo() throws -> ORTTensorTypeAndShapeInfo { ORTTensorTypeAndShapeInfo() }
    public func tensorData() throws -> NSMutableData { NSMutableData() }
}

public class ORTSession {
    public init(env: ORTEnv, modelPath: String, sessionOptions: ORTSessionOptions?) throws {}
    public func run(
        withInputs inputs: [String: ORTValue], outputNames: Set<String>, runOptions: ORTRunOptions?
    ) throws -> [String: ORTValue] { [:] }
}
